"""Manifests and text files: what is right loads, what is wrong is named by its line, whatever bytes come."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omni.config import DataConfig, UserError
from omni.data.dialogue import Chat, read_chats
from omni.data.images import read_image_manifest
from omni.data.manifest import BadSamplesError, Row
from omni.data.speech import read_speech_manifest
from omni.data.text import read_text
from tests.conftest import write_tone

SKIP = DataConfig(on_bad_sample="skip", max_bad_fraction=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a recording, a picture, and all that is no file."""
    return make_folder(tmp_path_factory.mktemp("data") / "audio")


def make_folder(folder: Path) -> Path:
    (folder / "wavs").mkdir(parents=True)
    write_tone(folder / "a.wav", 0.1)
    write_tone(folder / "wavs" / "b.wav", 0.1)
    write_tone(folder / "näme with, comma.wav", 0.1)
    write_tone(folder.parent / "outside.wav", 0.1)
    write_tone(folder.parent.parent / "far.wav", 0.1)
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "empty.wav").touch()
    os.mkfifo(folder / "pipe.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    (folder / "link.wav").symlink_to("../../far.wav")
    return folder


def found_in(folder: Path, name: str, content: bytes | str, rules: DataConfig) -> list[Any]:
    """What the reader for this kind of file finds."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    readers: dict[str, Callable[..., Any]] = {
        ".csv": read_speech_manifest, ".json": read_image_manifest, ".jsonl": read_chats, ".txt": read_text,
    }  # fmt: skip
    return readers[path.suffix](path, rules)


def problems_in(folder: Path, name: str, content: bytes | str, rules: DataConfig = DataConfig()) -> list[str]:  # noqa: B008
    with pytest.raises(UserError) as caught:
        found_in(folder, name, content, rules)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{folder / name}:") for line in lines), lines
    return [line.removeprefix(f"{folder / name}:") for line in lines]


# ---- what is right, however it is written ----

ROWS = [("a.wav", 'say "hello", you'), ("wavs/b.wav", "two\nlines"), ("näme with, comma.wav", "ж\u2028\x85\x0b end")]
QUOTED = ['"{}","{}"'.format(*(field.replace('"', '""') for field in row)) for row in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        "wav,text\n" + "\n".join(QUOTED),
        "\ufeffwav,text\r\n" + "\r\n".join(QUOTED) + "\r\n",
        "wav,text\r" + "\r".join(QUOTED) + "\r",
        "\n\nwav;text\n" + "\n\n;\n".join(line.replace('","', '";"') for line in QUOTED) + "\n;;\n",
        "wav\ttext\tspeaker\n" + "\n".join(line.replace('","', '"\t"') + "\tx" for line in QUOTED),
        "text, wav ,,\n" + "\n".join('"{1}", "{0}",,'.format(*line.strip('"').split('","')) for line in QUOTED),
    ],
    ids=["plain", "BOM and CRLF", "CR", "semicolons and empty rows", "tabs", "spaces, order and empty columns"],
)
def test_every_way_to_write_a_table_means_the_same(content: str, folder: Path) -> None:
    rows = found_in(folder, "good.csv", content, DataConfig())
    assert [(row.values["wav"], row.values["text"]) for row in rows] == ROWS
    assert all(row.path("wav").is_file() for row in rows)


def test_a_row_is_where_it_begins(folder: Path) -> None:
    rows = found_in(folder, "good.csv", 'wav,text\na.wav,"one\ntwo\nthree"\n\na.wav,x\n', DataConfig())
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "6"]
    entries = '[\n{"image": "a.png",\n "caption": "x"},\n\n{"image": "a.png", "caption": "y"}]'
    rows = found_in(folder, "good.json", entries, DataConfig())
    assert [row.where.partition(".json:")[2] for row in rows] == ["2: entry 1", "5: entry 2"]


def test_text_is_the_same_with_any_line_ends_and_a_mark(folder: Path) -> None:
    for content in ("one\ntwo \u2028 ж\n", "\ufeffone\r\ntwo \u2028 ж\r\n", "one\rtwo \u2028 ж\r"):
        assert found_in(folder, "good.txt", content, DataConfig()) == "one\ntwo \u2028 ж\n"


# ---- what is wrong ----

DEEP = "[" * 100_000
CHAT = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'


def picture(path: str, caption: str = '"x"', more: str = "") -> str:
    return f'{{"image": {path}, "caption": {caption}{more}}}'


def seen(path: str, kind: str = "image") -> str:
    content = [{"type": kind, kind: path}]
    return json.dumps({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        # encodings
        ("x.csv", b"wav,text\na.wav,x\na.wav,caf\xe9\na.wav,\xff\n", ["3: not UTF-8", "4: not UTF-8"]),
        ("x.csv", "wav,text\na.wav,x\n".encode("utf-16"), ["1: not UTF-8 but UTF-16"]),
        ("x.csv", b"wav,text\na.wav,x\0y\n", ["2: found a NUL byte"]),
        ("x.csv", b"", [" empty"]),
        ("x.csv", b"\xef\xbb\xbf \r\n", [" empty"]),
        ("x.csv", b"PK\x03\x04\0\0\xff", ["1: not UTF-8 .* zip archive"]),
        ("x.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", [" found a Git LFS pointer"]),
        ("x.txt", b"one\r\ntwo\0\r\n\xfe\n", ["2: found a NUL byte", "3: not UTF-8"]),
        ("x.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", [" found a Git LFS pointer"]),
        # tables
        ("x.csv", "path,words\na.wav,x\n", ["1: found columns path, words, expected wav, text"]),
        ("x.csv", "wav,text,text\na.wav,x,y\n", ["1: found columns wav, text, text, expected .* once"]),
        ("x.csv", "\n\nwav\na.wav\n", ["3: found columns wav, expected wav, text"]),
        ("x.csv", "wav,text\n", [" no rows"]),
        ("x.csv", "wav,text\na.wav,x,y\na.wav\na.wav,x\n,x\n", ["2: more", "3: found no text", "5: found no wav"]),
        ("x.csv", 'wav,text\na.wav,x\na.wav,"x\na.wav,x\n', ["3: not valid CSV"]),
        ("x.csv", 'wav,text\na.wav,"x"y\na.wav, \nno.wav,x\n', ["2: not valid", "3: found no text", "4: wav: no such"]),
        ("x.csv", 'wav,text\na.wav,"x\na.wav,x\na.wav,"y"\n,x\n', ["2: not valid CSV", "5: found no wav"]),
        ("x.csv", 'wav,"text\na.wav,x\n', ["1: not valid CSV"]),
        # lists
        ("x.json", "[" + picture('"a.png"') + ",\n]", ["1: not valid JSON .a comma before"]),
        ("x.json", "[\n" + picture('"a.png"', more=",") + "]", ["2: not valid JSON .a comma before"]),
        ("x.json", picture('"a.png"'), ["1: found an object, expected a list"]),
        ("x.json", "[]", [" no rows"]),
        ("x.json", "[1,\nnull,\n" + picture("3") + ",\n" + picture('"a.png"', "[1]") + "]",
         ["1: entry 1: found a number", "2: entry 2: found null", "3: entry 3: image: found a number",
          "4: entry 4: caption: found a list, expected a text"]),
        ("x.json", "[" + picture('"a.png"', more=', "caption": "z"') + "]", ["1: entry 1: caption: found twice"]),
        ("x.json", "[" + picture('"a.png"', '"\\ud83d"') + "]", ["1: entry 1: found .* half of a"]),
        ("x.json", "[" + picture('"a\\u0000.png"') + "]", ["1: entry 1: found .u0000"]),
        ("x.json", "[" + picture('"a.png"', more=', "n": NaN') + "]", ["1: entry 1: found NaN"]),
        ("x.json", "[" + picture('"a.png"', more=', "n": ' + "9" * 5000) + "]", ["1: entry 1: .* 5000 digits"]),
        ("x.json", "[\n" + DEEP, ["2: nested too deeply"]),
        ("x.json", "[" + picture('"a.png"') + "\n" + picture('"a.png"') + "]", ["2: not valid JSON, expected a comma"]),
        ("x.json", "[" + picture('"a.png"') + "]\nmore", ["2: found more after"]),
        ("x.json", "[" + picture('"a.png"'), ["1: not valid JSON, expected a comma or"]),
        ("x.json", "[" + picture('"a.png"', more=', "negatives": "y", "swaps": [1]') + "]",
         ["1: entry 1: negatives: found a text", "1: entry 1: swaps: found a list"]),
        # one object a line
        ("x.jsonl", CHAT + "\n{,}\n\n" + CHAT + " x\n[]\n", ["2: not valid JSON", "4: found more", "5: found a list"]),
        ("x.jsonl", CHAT[:-1] + ",}\n" + DEEP + "\n" + CHAT[:-1] + ', "messages": []}',
         ["1: not valid JSON .a comma before", "2: nested too deeply", "3: messages: found twice"]),
        ("x.jsonl", '{"messages": "hi"}\n{"task": "x"}\n', ["1: messages: found a text", "2: messages: found null"]),
        ("x.jsonl", '{"messages": [{"role": "user", "content": "x\\ud800"}]}', ["1: found .* half of a"]),
        ("x.jsonl", CHAT[:-1] + ', "template": 3}', ["1: template: found a number"]),
        ("x.jsonl", CHAT[:-1] + ', "task": null}', ["1: task: found null, expected a text"]),
        ("x.jsonl", seen("no.png") + "\n" + seen("a.wav") + "\n" + seen("a.png", "audio"),
         ["1: image: no such file", "2: .*found a WAV recording", "3: .*found a PNG picture"]),
        ("x.jsonl", f'{seen("../../far.wav", "audio")}\n{seen("../outside.wav", "audio")}', ["1: audio: .* elsewhere"]),
    ],
)  # fmt: skip
def test_every_problem_is_named_by_its_line(name: str, content: bytes | str, expected: list[str], folder: Path) -> None:
    problems = problems_in(folder, name, content)
    assert len(problems) == len(expected), problems
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.match(pattern, problem), (problem, pattern)
        assert "expected" in problem


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("no.wav", "no such file"),
        ("wavs", "found a folder"),
        ("pipe.wav", "found a named pipe"),
        ("loop.wav", "found a loop of symbolic links"),
        ("/dev/null", "found the absolute path"),
        ("../outside.wav", "which lies elsewhere"),
        ("link.wav", "which lies elsewhere"),
        ("wavs\\b.wav", "no such file .* write its path with /"),
        ("x" * 300, "found a name that is too long"),
        ("a.wav/b.wav", "no such file"),
        ("empty.wav", "found an empty file"),
    ],
)
def test_every_bad_path_is_named(path: str, expected: str, folder: Path) -> None:
    (problem,) = problems_in(folder, "x.csv", f"wav,text\na.wav,x\n{path},x\n")
    assert problem.startswith("3: wav: ") and re.search(expected, problem) and len(problem) < 500
    if "elsewhere" in expected:
        assert "data.allow_outside_paths" in problem


def test_outside_paths_may_be_allowed(folder: Path) -> None:
    allowed = DataConfig(allow_outside_paths=True)
    content = f"wav,text\n../outside.wav,x\nlink.wav,y\n{folder / 'a.wav'},z\n"
    assert len(found_in(folder, "x.csv", content, allowed)) == 3
    (problem,) = problems_in(folder, "x.csv", content + "/dev/null,x\n", allowed)
    assert "found a device /dev/null" in problem


@pytest.mark.parametrize("reader", [read_speech_manifest, read_image_manifest, read_chats, read_text])
def test_the_manifest_itself_may_be_no_file(reader: Callable[[Path], Any], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for path, expected in (
        (folder / "pipe.wav", "found a named pipe"),
        (folder / "loop.wav", "found a loop"),
        (tmp_path / "nowhere", "no such file"),
        (tmp_path / ("x" * 300), "found a name that is too long"),
        (tmp_path / "texts", r"found a folder|found no \*.txt"),
    ):
        with pytest.raises(UserError, match=expected):
            reader(path)


def test_texts_have_a_limit(folder: Path) -> None:
    rules = DataConfig(max_text_chars=10)
    long = "0123456789x"
    assert problems_in(folder, "x.csv", f"wav,text\na.wav,{long}\na.wav,x\n", rules)[0].startswith(
        "2: text: found 11 char"
    )
    content = "[" + picture('"a.png"', f'"{long}"') + "]"
    assert problems_in(folder, "x.json", content, rules)[0].startswith("1: entry 1: caption: found 11 characters")
    assert problems_in(folder, "x.jsonl", CHAT.replace('"x"', f'"{long}"'), rules)[0].startswith("1: text: found 11")
    for end in ("", "\n"):
        content = f"{long[:-1]}\n\n{long}{long}\nx\n{long}{end}"
        problems = problems_in(folder, "x.txt", content, rules)
        assert [problem[:26] for problem in problems] == ["3: found 22 characters, ex", "5: found 11 characters, ex"]
        half = DataConfig(max_text_chars=10, on_bad_sample="skip", max_bad_fraction=0.5)
        assert found_in(folder, "x.txt", content, half) == f"{long[:-1]}\n\nx\n"


def test_problems_are_capped_and_counted(folder: Path) -> None:
    with pytest.raises(BadSamplesError) as caught:
        found_in(folder, "x.csv", "wav,text\n" + "no.wav,x\n" * 50, DataConfig())
    assert str(caught.value).endswith("... and 30 more problems") and len(caught.value.problems) == 50


@pytest.mark.parametrize("broken", ["no.wav,x", "a.wav", 'a.wav,"x"y'])
def test_bad_rows_may_be_skipped_up_to_a_share(broken: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = "wav,text\n" + "a.wav,x\n" * 9 + f"{broken}\n"
    with caplog.at_level(logging.WARNING, "omni"), propagated():
        rows = found_in(folder, "x.csv", content, DataConfig(on_bad_sample="skip", max_bad_fraction=0.1))
    assert len(rows) == 9 and "1 of 10 samples cannot be used" in caplog.text and "x.csv:11" in caplog.text
    problems = problems_in(folder, "x.csv", content, DataConfig(on_bad_sample="skip", max_bad_fraction=0.09))
    assert "expected at most 0.09 of them" in problems[0] and problems[1].startswith("11: ")
    # a quote that stays open does not take the rows after it along
    unclosed = content.replace("a.wav,x\n", 'a.wav,"x\n', 1)
    assert len(found_in(folder, "x.csv", unclosed, SKIP)) == 8


@contextlib.contextmanager
def propagated() -> Any:
    log = logging.getLogger("omni")
    before, log.propagate = log.propagate, True
    try:
        yield
    finally:
        log.propagate = before


# ---- whatever bytes come: a clear error or valid rows ----

VALID = {
    "x.csv": 'wav,text,speaker\na.wav,hello there,s1\nwavs/b.wav,"two, ""quoted""",s2\n"näme with, comma.wav",x,\n',
    "x.json": "[" + ",\n".join([picture('"a.png"'), picture('"a.png"', '"y"', ', "negatives": ["z"], "n": 1.5')]) + "]",
    "x.jsonl": "\n".join([CHAT, seen("a.png"), seen("../outside.wav", "audio")]),
    "x.txt": "one two\n\nthree ж\n",
}  # fmt: skip
# what a piece is: a whole text, number or bracket; a word or a mark; a byte
PIECES = [re.compile(pattern, re.DOTALL) for pattern in (rb'"[^"]*"|[^\s",:\[\]{}]+|.', rb"\w+|.", rb".")]
PATHS = ['"/dev/zero"', '"../../far.wav"', '"pipe.wav"', '"loop.wav"', '"link.wav"', '"wavs"', '"a.wav"', '"a.png"']
TARGETS = [
    b'"a.png"',
    b'"../outside.wav"',
    b"a.wav",
    b"wavs/b.wav",
    b"hello there",
    b'"x"',
    b"1.5",
    b'"image"',
    b'"user"',
]
VALUES = [
    "null", "true", "NaN", "1e999", "9" * 5000, "-0", "[]", "{}", '""', '" "', '"\\ud800"', '"\\u0000"', "[" * 2000,
    '"x\ny"', '{"image": "a.png"}',
]  # fmt: skip
MARKS = [
    "\n", "\r", "\r\n", '"', '""', ",", ";", "\t", "[", "]", "{", "}", ":", "\\", "\\ud800", "\\u0000", "\0", "\ufeff",
    "\u2028", "\x85", "-", "../", "/", "..", "#", "'", " ", "\x1a", "x" * 300, "\U0001f600", "loop.wav", "wavs",
]  # fmt: skip
RULES = st.builds(
    DataConfig,
    on_bad_sample=st.sampled_from(["error", "skip"]),
    max_bad_fraction=st.sampled_from([0.0, 0.5, 1.0]),
    max_text_chars=st.sampled_from([10, 1_000_000]),
    allow_outside_paths=st.booleans(),
)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name and a content: any bytes, any text, or a valid file of which pieces were removed, doubled or put in."""
    name = draw(st.sampled_from(sorted(VALID)))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return name, draw(st.binary(max_size=200))
    if kind == 1:
        return name, draw(st.text(max_size=100)).encode("utf-8", "surrogatepass")
    content = VALID[name].encode()
    for _ in range(draw(st.integers(1, 3))):
        known = [value for value in TARGETS if value in content]
        if known and draw(st.booleans()):  # another value in the place of one that is right
            value = draw(st.sampled_from([*PATHS, *VALUES]))
            content = content.replace(draw(st.sampled_from(known)), value.encode(), 1)
            continue
        pieces = draw(st.sampled_from(PIECES)).findall(content) or [b""]
        new = draw(
            st.sampled_from(draw(st.sampled_from([PATHS, VALUES, MARKS]))).map(str.encode)
            | st.sampled_from(pieces)
            | st.binary(max_size=3)
        )
        at = draw(st.integers(0, len(pieces) - 1))
        length = draw(st.integers(0, 3))  # 0: it is put in, otherwise it takes the place of others
        content = b"".join([*pieces[:at], new, *pieces[at + length :]]) or b" "
    return name, content


def check_reading(folder: Path, name: str, content: bytes, rules: DataConfig) -> None:
    """Read a file; anything but valid rows and a clear error fails."""
    try:
        found = found_in(folder, name, content, rules)
    except UserError as error:
        lines = str(error).split("\n")
        assert all(
            (line.startswith(f"{folder / name}:") and "expected" in line) or "... and " in line for line in lines
        )
        assert all(line.isprintable() for line in lines), lines
        assert len(str(error)) < 20 * 1000
        return
    assert found
    for item in [found] if isinstance(found, str) else found:
        if isinstance(item, Chat):
            assert item.messages[-1].role == "assistant" and item.where.startswith(f"{folder / name}:")
            for path in (*item.paths("image"), *item.paths("audio")):
                assert Path(path).is_file()
                assert rules.allow_outside_paths or Path(path).resolve().is_relative_to(folder.parent.resolve())
            texts = [part.value for message in item.messages for part in message.parts]
        elif isinstance(item, Row):
            columns = ("wav", "text") if name.endswith("csv") else ("image", "caption")
            texts = [item.values[column] for column in columns]
            assert item.path(columns[0]).is_file() and texts[1].strip() and len(texts[1]) <= rules.max_text_chars
            assert rules.allow_outside_paths or item.path(columns[0]).resolve().is_relative_to(folder.resolve())
        else:
            texts = [item]
        for text in texts:
            assert isinstance(text, str) and "\0" not in text and text.encode().decode() == text


def test_any_file_is_rows_or_a_clear_error(folder: Path) -> None:
    run_cases(folder, 400)


@pytest.mark.slow
def test_ten_thousand_files_are_rows_or_a_clear_error(folder: Path) -> None:
    run_cases(folder, 10_000)


def run_cases(folder: Path, number: int) -> None:
    """The property, on that many files; without the thousands of warnings about samples left out."""

    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(files(), RULES)
    def case(file: tuple[str, bytes], rules: DataConfig) -> None:
        check_reading(folder, *file, rules)

    logging.getLogger("omni").setLevel(logging.ERROR)  # until the end of this test
    case()
