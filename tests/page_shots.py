"""The page in a real Chromium: what the test of the page and the screenshots in the docs share. Also a script:

    python -m tests.page_shots CHECKPOINT [--out docs/page]

asks the model of a checkpoint about a picture and writes OUT_desktop.png and OUT_phone.png;

    python -m tests.page_shots PAGE.html --out docs/report

opens a page that is a file, such as a report, and writes OUT_desktop.jpg and OUT_phone.jpg.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = {"desktop": (1100, 900), "phone": (390, 844)}


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a microphone that beeps, or None where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    words = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    words.append("--autoplay-policy=no-user-gesture-required")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=words)
        try:
            yield browser
        finally:
            browser.close()


def opened(browser: Any, port: int, width: int = 1100, height: int = 800) -> Any:
    """The page, once it knows its model. (Its policy forbids the `eval` behind Playwright's wait_for_function.)"""
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.set_default_timeout(120_000)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#send:enabled")
    return page


def ask(page: Any, question: str, files: dict[str, Path] | None = None) -> str:
    """Type a question, with files for the inputs ``image`` and ``audio``, and wait for the whole answer."""
    count = page.locator(".assistant").count()
    for number, (name, path) in enumerate((files or {}).items()):
        page.set_input_files(f"#{name}", path)
        page.locator(".chip").nth(number).wait_for()
    page.fill("#question", question)
    page.click("#send")
    return answer(page, count)


def answer(page: Any, number: int) -> str:
    """The text of an answer once it is complete."""
    bubble = page.locator(".assistant .bubble").nth(number)
    page.locator(".assistant .bubble[data-done]").nth(number).wait_for()
    return str(bubble.locator(".answer").text_content())


def shoot_file(path: Path, out: str) -> int:
    """Screenshots of a page that is a file: its beginning, and on a phone what stands at its first sound too."""
    with chromium() as browser:
        if browser is None:
            print("found no Chromium, expected chromium on PATH (apt-get install chromium)", file=sys.stderr)
            return 1
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": 2 * height})
            page.goto(path.absolute().as_uri())
            if name == "phone" and page.locator("audio").count():
                page.locator("audio").first.evaluate("a => a.closest('section').scrollIntoView()")
            page.screenshot(path=f"{out}_{name}.jpg", type="jpeg", quality=60)
            page.close()
    return 0


def main() -> int:
    """Take the screenshots."""
    from omni.assistant import Assistant
    from tests.serving import serving
    from tests.toy_omni import picture

    parser = argparse.ArgumentParser(description="screenshots of the page, asked about a picture")
    parser.add_argument("shown", type=Path, help="a checkpoint, or a page")
    parser.add_argument("--out", default="docs/page", help="written as OUT_desktop.png and OUT_phone.png")
    parser.add_argument("--image", type=Path, help="a picture; by default a red square")
    parser.add_argument("--audio", type=Path, help="a recording in which it is asked about")
    parser.add_argument("--question", default="what is the color of the square ?")
    words = parser.parse_args()
    if words.shown.suffix == ".html":
        return shoot_file(words.shown, words.out)
    assistant = Assistant.load(words.shown, "cpu")
    shown = words.image or Path(f"{words.out}_question.png")
    if words.image is None:
        shown.write_bytes(picture(size=64))
    with serving(assistant) as (port, _), chromium() as browser:
        if browser is None:
            print("found no Chromium, expected chromium on PATH (apt-get install chromium)", file=sys.stderr)
            return 1
        for name, (width, height) in SIZES.items():
            page = opened(browser, port, width, height)
            files = {"image": shown} | ({"audio": words.audio} if words.audio else {})
            print(ask(page, "" if words.audio else words.question, files))
            page.locator("summary").last.click()
            page.locator("main").evaluate("main => { main.scrollTop = main.scrollHeight; }")
            page.screenshot(path=f"{words.out}_{name}.png")
            page.close()
    if words.image is None:
        shown.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
