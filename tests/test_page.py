"""The page, in a real headless Chromium: asked by text, picture and voice, it answers aloud; nothing leaves here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from omni.assistant import Assistant
from omni.server.page import load_page
from tests import toy_omni
from tests.page_shots import answer, ask, chromium, opened
from tests.serving import call, chat, serving
from tests.toy_omni import picture, sound


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(*toy_omni.build(), "toy")


@pytest.fixture(scope="module")
def port(assistant: Assistant) -> Iterator[int]:
    with serving(assistant) as (found, _):
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        if found is None:
            pytest.skip("found no Chromium on PATH: apt-get install chromium")
        yield found


@pytest.fixture
def page(browser: Any, port: int) -> Iterator[Any]:
    """A tab that watches what it says and where it goes."""
    errors, hosts = list[str](), set[str]()
    context = browser.new_context()
    context.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("request", lambda sent: hosts.add(urlsplit(sent.url).hostname or urlsplit(sent.url).scheme))
    yield opened(context, port)
    assert errors == [] and "127.0.0.1" in hosts and hosts <= {"127.0.0.1", "blob", "data"}
    context.close()


def width_fits(page: Any) -> bool:
    return bool(page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth"))


def test_a_conversation(page: Any, port: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.wav").write_bytes(sound())
    page.uncheck("#speak")
    typed = ask(page, "what is it ?")
    expected = call(port, "/v1/chat/completions", chat("what is it ?", max_tokens=None))[2]
    assert typed == expected["choices"][0]["message"]["content"]
    page.click("#reset")
    assert page.locator(".turn").count() == 0
    seen = ask(page, "what is it ?", {"image": tmp_path / "a.png"})
    assert seen != typed and page.locator(".user img").count() == 1
    page.click("#reset")
    page.check("#speak")
    heard = ask(page, "so ?", {"audio": tmp_path / "b.wav"})
    assert heard not in (typed, seen) and page.locator(".user audio").count() == 1
    # the answer can be played again, and its spectrogram shows something
    player = page.locator(".assistant audio")
    assert player.evaluate("a => new Promise(r => { a.onended = () => r(a.duration); a.play(); })") > 0.2
    shades = page.locator("canvas").evaluate(
        "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    )
    assert shades > 20
    # what the model read: the placeholders of the sound, and the words
    page.locator("summary").click()
    pieces = page.locator(".piece.audio")
    assert pieces.count() == 1 and pieces.inner_text().startswith("sound 1 × ")
    assert "".join(page.locator(".piece.text").all_inner_texts()).strip() == "so ?"
    assert width_fits(page)
    page.set_viewport_size({"width": 360, "height": 700})
    assert width_fits(page) and page.locator("#send").bounding_box()["height"] >= 44
    assert page.locator("#send").is_visible() and page.locator("#question").is_visible()


def test_speech_is_heard_before_it_is_complete(page: Any) -> None:
    page.evaluate("""() => { window.starts = [];
        const play = Sound.prototype.play;
        Sound.prototype.play = function (x) { window.starts.push([x.length, !!state.busy]); play.call(this, x); }; }""")
    ask(page, "what is it ?")
    starts = page.evaluate("window.starts")
    assert len(starts) > 3 and all(busy for _, busy in starts) and page.evaluate("state.sound.sources.length") > 3


def test_dropping_holding_and_mistakes(page: Any, tmp_path: Path) -> None:
    page.uncheck("#speak")
    drop = """data => { const t = new DataTransfer();
        t.items.add(new File([Uint8Array.from(data)], 'dropped.png', {type: 'image/png'}));
        document.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true})); }"""
    page.evaluate(drop, list(picture()))
    page.wait_for_selector(".chip img")
    button = page.locator("#talk").bounding_box()
    page.mouse.move(button["x"] + 10, button["y"] + 10)
    page.mouse.down()
    page.wait_for_selector("#talk:has-text('Listening')")
    page.wait_for_timeout(1200)
    page.mouse.up()
    assert answer(page, 0) and page.locator(".user img").count() == page.locator(".user audio").count() == 1
    part = page.evaluate("state.messages[0].content[1].input_audio")
    assert part["format"] == "wav" and len(part["data"]) > 20_000
    # a long conversation goes on without its oldest turns, which is said once
    for number in range(8):
        assert ask(page, f"what is the number {number} ?")
    assert page.locator(".note", has_text="oldest turns").count() == 1


def test_a_refusal_is_shown_and_the_page_goes_on(browser: Any, port: int, tmp_path: Path) -> None:
    page = opened(browser, port)
    (tmp_path / "bad.png").write_bytes(b"hello")
    assert "not a readable picture" in ask(page, "what is it ?", {"image": tmp_path / "bad.png"})
    page.uncheck("#speak")
    assert "not a readable" not in ask(page, "what is it ?") and page.evaluate("state.messages.length") == 2
    page.close()


def test_the_policy_lets_nothing_else_run(browser: Any, port: int) -> None:
    html, policy = load_page()
    assert "unsafe" not in policy and "http" not in policy and b"http://" not in html and b"https://" not in html
    assert policy.count("'sha256-") == 2 and "default-src 'none'" in policy
    page = opened(browser, port)
    refused = page.evaluate("""() => new Promise(done => {
        document.addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));
        const script = document.createElement('script'); script.textContent = 'window.ran = true';
        document.body.append(script); })""")
    assert refused.startswith("script-src") and page.evaluate("window.ran") is None
    with pytest.raises(Exception, match=r"fetch|Failed"):
        page.evaluate("fetch('http://127.0.0.1:9/x')")
    page.close()


def test_the_page_needs_no_browser_to_be_whole(port: int) -> None:
    status, headers, html = call(port, "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and b"<title>" in html
    assert "script-src 'sha256-" in headers["content-security-policy"]
