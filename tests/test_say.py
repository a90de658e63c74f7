"""`omni speak`: any text, known voices, the voice of a recording; clear refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from omni.checkpoint import save_checkpoint
from omni.cli import main
from omni.config import to_dict
from omni.models.codec import CodecConfig
from omni.models.quantizer import QuantizerConfig
from omni.models.speaker import SpeakerConfig
from omni.models.speech import SpeechConfig, SpeechModel
from omni.models.talker import TalkerConfig
from omni.models.vocoder import VocoderConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Talker from random weights with two voices; it does without a Thinker."""
    torch.manual_seed(0)
    config = SpeechConfig(
        codec=CodecConfig(dim=16, num_layers=1, quantizer=QuantizerConfig(codebook_size=16, dim=8)),
        vocoder=VocoderConfig(dim=16, num_layers=1),
        speaker=SpeakerConfig(dim=16, num_layers=1, embedding_dim=8),
        talker=TalkerConfig(dim=32, num_layers=1, num_heads=2, hidden_dim=32),
        voices=("ann", "bob"),
    )
    model = SpeechModel(config)
    model.voices_NE.copy_(torch.nn.functional.normalize(torch.randn(2, 8), dim=-1))
    path = tmp_path_factory.mktemp("talker") / "talker.pt"
    summary = {"kind": "talker", "model_config": to_dict(config), "config": {"thinker_ckpt": None}}
    save_checkpoint(path, {"weights": model.state_dict()}, summary)
    return path


def say(checkpoint: Path, out: Path, text: str, *words: str) -> int:
    return main(["speak", text, "--checkpoint", str(checkpoint), "--out", str(out), *words])


def test_voices_sound_different_and_a_voice_the_same_again(checkpoint: Path, tmp_path: Path) -> None:
    names = {"one.wav": (), "ann.wav": ("--voice", "ann"), "bob.wav": ("--voice", "bob")}
    for name, words in names.items():
        assert say(checkpoint, tmp_path / name, "a red circle.", *words) == 0
    one, ann, bob = (soundfile.read(tmp_path / name) for name in names)
    assert one[1] == 16000 and len(one[0]) > 1600
    assert np.array_equal(one[0], ann[0])  # the first voice is the default
    assert len(ann[0]) != len(bob[0]) or not np.array_equal(ann[0], bob[0])


def test_the_voice_of_a_recording(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "me.wav", np.sin(np.arange(48000) * 0.05) * np.linspace(0, 0.5, 48000), 24000)
    assert say(checkpoint, tmp_path / "x.wav", "hello", "--reference", str(tmp_path / "me.wav")) == 0
    assert f"voice {tmp_path / 'me.wav'}" in capsys.readouterr().out
    assert say(checkpoint, tmp_path / "x.wav", "hello", "--reference", "me.wav", "--voice", "bob") == 1


def test_sampling_follows_its_seed(checkpoint: Path, tmp_path: Path) -> None:
    waves = []
    for seed in ("1", "1", "2"):
        words = ("--temperature", "1", "--top-k", "8", "--top-p", "0.9", "--seed", seed)
        assert say(checkpoint, tmp_path / "x.wav", "a red circle.", *words) == 0
        waves.append(soundfile.read(tmp_path / "x.wav")[0])
    assert np.array_equal(waves[0], waves[1])
    assert len(waves[0]) != len(waves[2]) or not np.array_equal(waves[0], waves[2])


@pytest.mark.parametrize(
    "text", ["3 + 4 = 7", "caf\u00e9 😀!", "the number 5. " * 350, "x", "don't \u2014 \u201cstop\u201d"]
)
def test_any_text_with_words_is_spoken(text: str, checkpoint: Path, tmp_path: Path) -> None:
    assert say(checkpoint, tmp_path / "x.wav", text) == 0
    assert len(soundfile.read(tmp_path / "x.wav")[0]) > 160


@pytest.mark.parametrize(
    ("text", "words", "code", "expected"),
    [
        ("", (), 1, "found nothing to speak"),
        ("😀 ... 你好", (), 1, "found nothing to speak"),
        ("a" * 20_001, (), 1, "expected at most 20000 to speak"),
        ("hello", ("--voice", "zoe"), 1, "found 'zoe', expected one of ann, bob"),
        ("hello", ("--reference", "nothing.wav"), 1, "nothing.wav: no such file"),
        ("hello", ("--temperature", "-1"), 2, "--temperature: found -1, expected 0 or more"),
        ("hello", ("--top-p", "0"), 2, "--top-p: found 0, expected a share"),
        ("hello", ("--seed", "-1"), 2, "--seed: found -1, expected 0 or more"),
        ("hello", ("--speed", "0"), 2, "--speed: found 0, expected 0.25 to 4"),
        ("hello", ("--out", "x.mp3"), 1, "expected the name of a .wav file"),
        ("hello", ("--out", "nowhere/x.wav"), 1, "nowhere: no such folder"),
        ("hello", ("--checkpoint", "none.pt"), 1, "none.pt: no such checkpoint"),
        ("hello", ("--size", "gigantic", "--checkpoint", "none.pt"), 1, "none.pt"),
    ],
)
def test_refusals_are_one_sentence(
    text: str, words: tuple[str, ...], code: int, expected: str, checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert say(checkpoint, tmp_path / "x.wav", text, *words) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and said.count("\n") == 1
    assert not (tmp_path / "x.wav").exists()
