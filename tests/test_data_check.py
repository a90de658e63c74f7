"""`omni data check` on small projects of each stage: exit code, file and line of each problem, counts, leaks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from omni.cli import main
from omni.config import DataConfig, UserError
from omni.data import check, leaks
from omni.data.leaks import Medium, Part, Text, find_leaks, part_of_text, refuse_leaks, shared_media
from omni.data.manifest import Row
from omni.stages import STAGES
from tests.conftest import write_tone

Check = Callable[..., tuple[int, list[str]]]
PREFIXES = {stage.kind: stage.prefix for stage in STAGES}


@pytest.fixture
def run_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Check a configuration of a stage; its exit code and the lines it printed, from the file's name on."""

    def run(kind: str, model: dict[str, Any] | None = None, **data: Any) -> tuple[int, list[str]]:
        paths = {key: str(tmp_path / value) if isinstance(value, str) and "." in value else value
                 for key, value in data.items()}  # fmt: skip
        config = tmp_path / f"{PREFIXES[kind]}_mine.json"
        config.write_text(json.dumps({"name": f"{PREFIXES[kind]}_mine", "data": paths, "model": model or {}}))
        code = main(["data", "check", str(config)])
        return code, [line.replace(f"{tmp_path}/", "") for line in capsys.readouterr().out.splitlines()]

    return run


def write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n")


def write_pictures(folder: Path, *shades: int) -> None:
    for shade in shades:
        Image.new("L", (4, 4), shade).save(folder / f"{shade}.png")


def entry(image: str, caption: str) -> dict[str, str]:
    return {"image": image, "caption": caption}


def chat(*parts: tuple[str, str]) -> str:
    content = [{"type": kind, kind: value} for kind, value in parts]
    return json.dumps({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]})


# ---- each stage ----


def test_text(run_check: Check, tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "one two", "", "three four")
    write(tmp_path / "val.txt", "", "five", "", "three  Four", "", "six")
    code, lines = run_check("thinker", train="train.txt", val="val.txt")
    assert code == 0 and lines[-1] == "1 configurations, 0 problems, 1 warnings"
    assert lines[0].startswith("val.txt:4: warning: 1 of 3 texts here are in the training data too")
    assert lines[0].endswith("that of train.txt:3")
    (tmp_path / "val.txt").write_bytes(b"one\ntwo\0\n" + b"x" * 50 + b"\n")
    write(tmp_path / "test.txt", "x" * 50)
    code, lines = run_check("thinker", train="train.txt", val="val.txt", test="test.txt", max_text_chars=40)
    assert code == 1 and lines[-1] == "1 configurations, 2 problems, 0 warnings"
    assert [line.split(",")[0] for line in lines[:-1]] == [
        "val.txt:2: found a NUL byte", "test.txt:1: found 50 characters",
    ]  # fmt: skip


def test_recordings_and_transcripts(run_check: Check, tmp_path: Path) -> None:
    for number in range(6):
        write_tone(tmp_path / f"{number}.wav", 0.5, 300 + 50 * number)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    data = (tmp_path / "0.wav").read_bytes()
    (tmp_path / "torn.wav").write_bytes(data[:-3000])
    (tmp_path / "same.wav").write_bytes(data)
    write(tmp_path / "train.csv", "wav,text", "0.wav,hello", "1.wav,…?!", "2.wav,жук", "nan.wav,two", "no.wav,x")
    write(tmp_path / "val.csv", "wav,text", "3.wav,naïve жук", "torn.wav,four", "4.wav,Hello", "same.wav,six")
    write(tmp_path / "test.csv", "wav,text", f"5.wav,{'far too many words ' * 3}")
    manifests = {"train": "train.csv", "val": "val.csv", "test": "test.csv", "test_voices": None}
    code, lines = run_check("audio_enc", {"steps_per_state": 1}, **manifests)
    expected = [
        r"train\.csv:6: wav: no such file",
        r"train\.csv:3: text: found nothing to speak in '…\?!', expected words",
        r"train\.csv:5: nan\.wav: found NaN or Inf samples",
        r"train\.csv:4: warning: 1 of 4 transcripts have characters .* \(жку\)",
        r"val\.csv:3: torn\.wav: cut off: it should have 16044 bytes and has 13044",
        r"val\.csv:2: warning: 1 of 4 transcripts",
        r"val\.csv:5: the same file as train\.csv:2 \(same\.wav\), expected different ones",
        r"val\.csv:4: warning: 1 of 4 texts here are in the training data too",
        r"test\.csv:2: text: found 57 characters that need 59 CTC steps, expected at most 13 for 0\.50 s of sound",
        r"1 configurations, 6 problems, 3 warnings",
    ]
    assert code == 1 and len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), (line, pattern)
    # the Talker reads digits aloud and needs no CTC
    write(tmp_path / "train.csv", "wav,text", "0.wav,5", "1.wav,жук")
    code, lines = run_check("talker", train="train.csv", test="test.csv")
    assert code == 1 and len(lines) == 2 and lines[0].startswith("train.csv:3: text: found nothing to speak")


def test_pictures(run_check: Check, tmp_path: Path) -> None:
    write_pictures(tmp_path, 10, 20, 30)
    (tmp_path / "torn.png").write_bytes((tmp_path / "10.png").read_bytes()[:45])
    (tmp_path / "copy.png").write_bytes((tmp_path / "10.png").read_bytes())
    train = [entry("10.png", "ten"), entry("20.png", "twenty"), entry("torn.png", "torn")]
    (tmp_path / "train.json").write_text(json.dumps(train, indent=0))
    (tmp_path / "val.json").write_text(json.dumps([entry("copy.png", "zehn"), entry("30.png", "Twenty")]))
    code, lines = run_check("vision", train="train.json", val="val.json")
    assert code == 1 and lines[-1] == "1 configurations, 2 problems, 1 warnings"
    assert lines[0].startswith("train.json:10: entry 3: torn.png: not a readable picture (found a PNG picture: ")
    assert lines[1].startswith("val.json:1: entry 1: the same file as train.json:2: entry 1 (copy.png), expected")
    assert lines[2].startswith("val.json:1: entry 2: warning: 1 of 2 texts")
    (tmp_path / "train.json").write_text(json.dumps(train[:2]))
    code, lines = run_check("vision", train="train.json", val="val.json", allow_leaks=True)
    assert code == 0 and lines[0].startswith("val.json:1: warning: entry 1: the same file as")
    code, lines = run_check("vision", train="train.json", max_pixels=15)
    assert code == 1 and "found 4 x 4 pixels, expected at most 15" in lines[0]


def test_chats_and_what_else_stage_e_reads(run_check: Check, tmp_path: Path) -> None:
    for folder in ("sft", "images", "audio"):
        (tmp_path / folder).mkdir()
    write_pictures(tmp_path / "images", 10, 20)
    write_tone(tmp_path / "audio" / "a.wav", 0.5)
    write_tone(tmp_path / "audio" / "b.wav", 0.5, 500)
    (tmp_path / "images" / "torn.png").write_bytes((tmp_path / "images" / "10.png").read_bytes()[:45])
    write(tmp_path / "sft" / "train.jsonl", chat(("text", "hi")), chat(("image", "../images/10.png")), "",
          chat(("audio", "../audio/a.wav")), chat(("image", "../images/torn.png"), ("text", "x")))  # fmt: skip
    write(tmp_path / "sft" / "val.jsonl", chat(("text", "Hi")), chat(("audio", "../audio/a.wav")), "{}")
    write(tmp_path / "audio" / "train.csv", "wav,text", "a.wav,one")
    write(tmp_path / "audio" / "val.csv", "wav,text", "b.wav,two", "c.wav,three")
    (tmp_path / "replay.txt").write_bytes(b"fine\n\xff\n")
    code, lines = run_check(
        "omni", train="sft/train.jsonl", val="sft/val.jsonl", replay_text="replay.txt",
        speech_train="audio/train.csv", speech_val="audio/val.csv", recordings="audio/train.csv",
    )  # fmt: skip
    assert code == 1 and lines[-1] == "1 configurations, 5 problems, 1 warnings"
    expected = [
        "sft/train.jsonl:5: sft/../images/torn.png: not a readable picture",
        "sft/val.jsonl:3: messages: found null, expected a list",
        "sft/val.jsonl:2: the same file as sft/train.jsonl:4",
        "sft/val.jsonl:1: warning: 1 of 1 texts",
        "replay.txt:2: not UTF-8",
        "audio/val.csv:3: wav: no such file",
    ]
    for line, start in zip(lines[:-1], expected, strict=True):
        assert line.startswith(start), (line, start)


# ---- configurations ----


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"val": "x.txt"}, r"data: names no train, expected a manifest"),
        ({"train": 3}, r"data\.train: found 3, expected a path"),
        ({"train": "x.txt", "max_pixels": "many"}, r"data: max_pixels: found \"many\", expected a whole number"),
        ({"train": "x.txt", "on_bad_sample": "ask"}, r"data: on_bad_sample: found"),
        ({"train": "x.txt", "max_text_chars": 0}, r"data: max_text_chars: found 0, expected more than 0"),
    ],
)
def test_keys_of_the_data_are_checked(data: dict[str, Any], expected: str, run_check: Check, tmp_path: Path) -> None:
    write(tmp_path / "x.txt", "some text")
    code, lines = run_check("thinker", **data)
    assert code == 1 and re.search(expected, lines[0]) and "1 problems" in lines[-1]


def test_problems_are_capped_per_file_and_counted(run_check: Check, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "wav,text", *["no.wav,x"] * 60)
    write(tmp_path / "val.csv", "wav,text", *["no.wav,x"] * 30)
    code, lines = run_check("audio_enc", train="train.csv", val="val.csv")
    assert code == 1 and len(lines) == 21 + 21 + 1 and lines[-1].startswith("1 configurations, 90 problems")
    assert lines[20] == "... and 40 more problems" and lines[41] == "... and 10 more problems"


def test_outside_paths_follow_the_configuration(run_check: Check, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write_tone(tmp_path / "a.wav", 0.5)
    write(tmp_path / "inner" / "train.csv", "wav,text", "../a.wav,one")
    assert run_check("audio_enc", train="inner/train.csv")[0] == 1
    assert run_check("audio_enc", train="inner/train.csv", allow_outside_paths=True)[0] == 0


def test_each_file_is_read_once(run_check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tone(tmp_path / "a.wav", 0.5)
    write_tone(tmp_path / "b.wav", 0.5, 500)
    write(tmp_path / "train.csv", "wav,text", "a.wav,one", "a.wav,one more")
    write(tmp_path / "val.csv", "wav,text", "b.wav,two")
    decoded = []
    monkeypatch.setattr(check, "load_audio", lambda path, *_, **__: decoded.append(path.name) or np.zeros(8000))
    code, _ = run_check("audio_enc", train="train.csv", val="val.csv", test="val.csv", test_voices="val.csv")
    assert code == 0 and sorted(decoded) == ["a.wav", "b.wav"]


def test_training_data_named_as_validation_leaks(run_check: Check, tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 0.5)
    write(tmp_path / "train.csv", "wav,text", "a.wav,one")
    code, lines = run_check("audio_enc", train="train.csv", val="train.csv")
    assert code == 1 and lines[0].startswith("train.csv:2: the same file as train.csv:2")


def test_further_manifests_are_training_data_too(run_check: Check, tmp_path: Path) -> None:
    for name, pitch in (("a", 300), ("b", 500), ("c", 700)):
        write_tone(tmp_path / f"{name}.wav", 0.5, pitch)
        write(tmp_path / f"{name}.csv", "wav,text", f"{name}.wav,{name} word")
    write(tmp_path / "bad.csv", "wav,text", "no.wav,one")
    more = [str(tmp_path / name) for name in ("b.csv", "bad.csv")]
    code, lines = run_check("audio_enc", train="a.csv", also_train=more, val="b.csv", test="c.csv")
    assert code == 1 and "1 configurations, 2 problems" in lines[-1]
    assert [line.split(": ")[0] for line in lines[:2]] == ["bad.csv:2", "b.csv:2"]  # unreadable; held out
    code, lines = run_check("audio_enc", train="a.csv", also_train="b.csv", val="c.csv")
    assert code == 1 and "data.also_train: found" in lines[0] and lines[0].endswith("expected a list of paths")


# ---- leaks ----


def rows(folder: Path, name: str, files: dict[str, bytes]) -> Part:
    media = []
    for line, (file, content) in enumerate(files.items(), 2):
        (folder / file).write_bytes(content)
        media.append(Medium(f"{name}:{line}", folder / file))
    return Part(media, [])


def test_files_are_compared_by_content_only_where_sizes_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = leaks.content_digest
    monkeypatch.setattr(leaks, "content_digest", lambda path: read.append(path.name) or digest(path))
    train = rows(tmp_path, "t", {"a": b"1", "b": b"22", "c": b"333", "d": b"333"})
    held_out = rows(tmp_path, "v", {"e": b"4444", "f": b"33x", "g": b"333"})
    found = shared_media(train.media, held_out.media)
    assert [(held.where, trained.where) for held, trained in found] == [("v:4", "t:4")]
    assert sorted(read) == ["c", "d", "f", "g"]
    assert find_leaks(train, rows(tmp_path, "v", {"h": b"55555"})).media == []


def test_a_stage_stops_unless_leaks_are_allowed(tmp_path: Path) -> None:
    part = rows(tmp_path, "t", {"a": b"1"})
    with pytest.raises(UserError, match=r"t:2: the same file as t:2 \(a\), expected .* or set data\.allow_leaks"):
        refuse_leaks(part, part, DataConfig())
    refuse_leaks(part, part, DataConfig(allow_leaks=True))
    texts = Part([], [Text("t:1", "One  two")])
    refuse_leaks(texts, Part([], [Text("v:1", "one two")]), DataConfig())
    assert len(find_leaks(texts, Part([], [Text("v:1", "one two"), Text("v:2", "three")])).texts) == 1


def test_documents_are_named_by_their_line() -> None:
    text = "one\ntwo\n\n\n\nthree\n\nfour\n"
    assert part_of_text(text, "x").texts == [Text("x:1", "one\ntwo"), Text("x:6", "three"), Text("x:8", "four\n")]


def test_rows_and_thousands_of_files_are_compared_quickly(tmp_path: Path) -> None:
    parts = []
    for part in range(2):
        found = []
        for number in range(2000):
            path = tmp_path / f"{part}_{number}"
            path.write_bytes(bytes(2 * number + part))
            found.append(Row(f"{part}:{number}", tmp_path, {"wav": path.name, "text": f"{part} {number}"}))
        parts.append(leaks.part_of_rows(found, "wav", "text"))
    began = time.perf_counter()
    assert find_leaks(*parts) == leaks.Leaks([], [])
    assert time.perf_counter() - began < 1
