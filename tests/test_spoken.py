"""`omni data speak`: a person's own text as recordings for stage B."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from pathlib import Path

import pytest

from omni.audio import load_audio
from omni.cli import main
from omni.config import UserError
from omni.data import espeak
from omni.data.espeak import TRAIN_VOICES
from omni.data.spoken import sentences, speak_texts

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra `synth` (espeak-ng)"
)
TEXT = "The trumpets sound; enter the king.\nHe has 2 sons! Yes.\n\nthe TRUMPETS sound?\n日本語です。 \U0001f600\n"


def test_sentences_are_what_is_said_each_once() -> None:
    assert list(sentences(TEXT)) == ["the trumpets sound", "enter the king", "he has two sons"]


def test_long_sentences_are_cut_at_a_mark_or_after_fourteen_words() -> None:
    words = [f"{letter}o" for letter in "abcdefghijklmnopqrst"]
    marked = " ".join([*words[:8], words[8] + ",", *words[9:]])
    assert [len(found.split()) for found in sentences(marked)] == [9, 11]
    assert [len(found.split()) for found in sentences(" ".join(words))] == [14, 6]
    assert [len(found.split()) for found in sentences(" ".join(words[:16]))] == [14]  # two words are no sentence


@needs_espeak
def test_the_command_writes_recordings_that_a_seed_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "play.txt"
    text.write_text(TEXT, encoding="utf-8")
    out = tmp_path / "spoken"
    (out / "wavs").mkdir(parents=True)
    (out / "wavs" / "spoken_00007.wav").write_bytes(b"of an earlier call")
    assert main(["data", "speak", str(text), "--out", str(out), "--sentences", "2", "--seed", "3"]) == 0
    assert "spoken.csv: 2 recordings" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "spoken.csv").open(encoding="utf-8")))
    assert {row["text"] for row in rows} < {"the trumpets sound", "enter the king", "he has two sons"}
    assert {row["speaker"] for row in rows} <= set(TRAIN_VOICES) and len({row["speaker"] for row in rows}) == 2
    assert sorted(path.name for path in (out / "wavs").iterdir()) == ["spoken_00000.wav", "spoken_00001.wav"]
    for row in rows:
        wave = load_audio(out / row["wav"], 16_000)
        assert 0.3 < len(wave) / 16_000 < 4 and float(wave.abs().max()) > 0.1

    def digest(folder: Path) -> str:
        return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.*")))).hexdigest()

    again = speak_texts([text], tmp_path / "again", 2, seed=3, processes=1)
    assert digest(again.parent) == digest(out)
    faster = speak_texts([text], tmp_path / "faster", 2, seed=3, pace=1.5)
    assert (faster.parent / rows[0]["wav"]).stat().st_size < 0.85 * (out / rows[0]["wav"]).stat().st_size
    assert speak_texts([text], tmp_path / "all", 100).read_text(encoding="utf-8").count("\n") == 4


def test_what_cannot_be_spoken_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "play.txt"
    text.write_text("Yes.\n12\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"play\.txt: found no sentence of 3 words or more"):
        speak_texts([text], tmp_path / "out", 10)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        speak_texts([tmp_path / "none.txt"], tmp_path / "out", 10)
    assert main(["data", "speak", str(text), "--out", str(tmp_path / "out"), "--sentences", "0"]) == 2
    assert "--sentences: found 0, expected 1 or more" in capsys.readouterr().err
    assert main(["data", "speak", str(text), "--out", str(tmp_path / "out"), "--pace", "9"]) == 2
    assert "--pace: found 9, expected 0.5 to 2" in capsys.readouterr().err
    text.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(espeak.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="espeak-ng is not installed"):
        speak_texts([text], tmp_path / "out", 10)
