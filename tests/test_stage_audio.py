"""Stage B as a person runs it, on 8 kHz WAV and 16 kHz FLAC."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_audio_enc
from omni.audio import SILENCE, MelConfig
from omni.config import RowsDataConfig, UserError
from omni.data.parts import read_parts
from omni.data.speech import Augmentation, Recordings, Transcribed, read_speech_manifest, scan_speech_manifest
from omni.evaluate.audio_enc import infeasible, recognize
from omni.inspection.ancestry import ancestry
from omni.inspection.facts import read_checkpoint
from omni.load import load_audio_encoder
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from omni.tokenizer import needed_steps
from tests.conftest import RunStage, metrics
from tests.forked import start_module

STAGE = train_audio_enc.AudioConfig, train_audio_enc.build
Write = Callable[[dict[str, Any]], Path]


def config(train: Path, save_dir: Path) -> dict[str, Any]:
    return {
        "name": "audio_enc_toy",
        "data": {"train": str(train), "val_split": 0.2, "spec_augment": False},
        "model": {"dim": 48, "num_layers": 1, "num_heads": 2, "hidden_dim": 96},
        "train": {"max_steps": 30, "batch_size": 6, "lr": 0.005, "warmup_steps": 3, "monitor": "cer"},
        "run": {"save_dir": str(save_dir), "val_freq": 30, "checkpoint_freq": 20, "print_freq": 5,
                "tensorboard": False, "num_threads": 1},
    }  # fmt: skip


def test_trains_resumes_and_can_be_loaded(
    babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage
) -> None:
    path = write_config(config(babble / "asr.csv", tmp_path / "run"))
    done = start_module("train_audio_enc", "--config", path, log=tmp_path / "said.txt")
    assert done.wait() == 0, done.log.read_text()
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    encoder = load_audio_encoder(tmp_path / "run" / "audio_enc.pt")
    recordings = Recordings(read_speech_manifest(babble / "asr.csv")[:3], encoder.config.mel)
    assert len(recognize(encoder, recordings).hypotheses) == 3
    assert infeasible(encoder, recordings).value == 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "audio_enc.pt").unlink()
    again = run_here(*STAGE, "--config", path, "--save_dir", tmp_path / "again")
    assert again.returncode == 0 and "step 20)" in again.stdout
    assert metrics(tmp_path / "run") == metrics(tmp_path / "again")


def test_goes_on_from_a_finished_one(babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage) -> None:
    """`audio_ckpt`: weights and shape are those of the file, whatever the configuration has; it is an ancestor."""
    path = write_config(config(babble / "asr.csv", tmp_path / "first"))
    assert run_here(*STAGE, "--config", path).returncode == 0
    first = tmp_path / "first" / "audio_enc.pt"
    words = ("--save_dir", tmp_path / "then", "--audio_ckpt", first, "--model.dim", 64, "--max_steps", 1, "--lr", 1e-9)
    done = run_here(*STAGE, "--config", path, *words)
    assert done.returncode == 0, done.stderr
    before, after = load_audio_encoder(first), load_audio_encoder(tmp_path / "then" / "audio_enc.pt")
    assert after.config == before.config and after.config.dim == 48
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    (parent,) = ancestry(read_checkpoint(tmp_path / "then" / "audio_enc.pt")).inputs
    assert (parent.kind, parent.state, parent.path) == ("audio_enc", "same", first)
    missing = run_here(*STAGE, "--config", path, *words[:2], "--audio_ckpt", tmp_path / "none.pt", "--fresh")
    assert missing.returncode == 1 and "none.pt: no such checkpoint, expected a finished audio_enc" in missing.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ("", "empty"),
        ("wav,text\n", "no rows"),
        ("path,words\n0.wav,a b\n", "found columns path, words, expected wav, text"),
        ("wav,text\nnothing.wav,a b\n0.wav,b\n", ":2: wav: no such file"),
        ("wav,text\n0.wav,\n0.wav,b\n", ":2: found no text"),
        ("wav,text\n0.wav,a,b\n0.wav,b\n", ":2: more fields than columns"),
        ("wav,text\nasr.csv,a\n0.wav,b\n", ":2: "),
        ("wav,text\n0.wav,a\n", "found one file"),
    ],
)
def test_bad_manifest_is_named_and_nothing_overwritten(
    content: str | None, expected: str, babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(babble, folder)
    manifest = folder / "bad.csv"
    if content is not None:
        manifest.write_text(content)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "audio_enc_best.pt").write_bytes(b"an earlier one")
    done = run_here(*STAGE, "--config", write_config(config(manifest, tmp_path / "run")))
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("error: ") and expected in done.stderr and "bad.csv" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "audio_enc_best.pt").read_bytes() == b"an earlier one"


def test_rows_of_several_manifests(babble: Path) -> None:
    """Further manifests are trained on, those named twice twice; each is split where there is no validation file."""
    lines = (babble / "asr.csv").read_text().splitlines()
    for name, part in (("one.csv", lines[1:11]), ("two.csv", lines[11:21])):
        (babble / name).write_text("\n".join([lines[0], *part]) + "\n")
    one, two = (str(babble / name) for name in ("one.csv", "two.csv"))

    def parts(**keys: Any) -> tuple[list[str], list[str], dict[str, Any]]:
        found = read_parts(scan_speech_manifest, "wav", "text", RowsDataConfig(train=one, val_split=0.2, **keys))
        names = [[row.values["wav"] for row in part] for part in (found.training, found.validation)]
        return names[0], names[1], found.fingerprint

    training, validation, alone = parts()
    assert (len(training), len(validation)) == (8, 2)
    both_training, both_validation, both = parts(also_train=(two, two))
    assert (len(both_training), len(both_validation)) == (8 + 2 * 8, 4)
    assert both_training[8:16] == both_training[16:] and not set(both_training) & set(both_validation)
    assert both_validation[:2] == validation and both["train"] == alone["train"]
    assert both["also_train.0"] == both["also_train.1"] != both["train"]
    with_file, held_out, _ = parts(also_train=(two,), val=two, allow_leaks=True)
    assert len(with_file) == 20 and len(held_out) == 10
    with pytest.raises(UserError, match=r"two\.csv:2: the same file as .*two\.csv:2"):
        parts(also_train=(two,), val=two)


def test_warped_utterances_still_hold_their_text(babble: Path) -> None:
    rows = read_speech_manifest(babble / "asr.csv")
    plain = Transcribed(rows, MelConfig(), lambda frames: frames, Augmentation(), "training")
    pairs = zip(plain.recordings.num_frames, plain.symbols, strict=True)
    each = min(frames // needed_steps(symbols) for frames, symbols in pairs)  # as many frames a step as can be
    found = Transcribed(rows, MelConfig(), lambda frames: frames // each, Augmentation(warp=0.4), "training")
    shortest = []
    for index in range(len(found)):
        needed = needed_steps(found.symbols[index])
        sizes = [len(found.sample(index, np.random.default_rng(seed))[0]) for seed in range(20)]
        assert min(sizes) // each >= needed
        shortest.append(min(sizes) // each == needed)
    assert any(shortest)  # the limit was met
    assert torch.equal(found.sample(0, None)[0], found.recordings.frames(0))  # not in validation


def test_a_share_of_the_recordings_is_heard_with_noise(babble: Path) -> None:
    found = Transcribed(
        read_speech_manifest(babble / "asr.csv"),
        MelConfig(),
        lambda frames: frames,
        Augmentation(noise=0.5),
        "training",
    )
    plain = found.recordings.frames(0)
    changed = [not torch.equal(found.sample(0, np.random.default_rng(seed))[0], plain) for seed in range(60)]
    assert 15 < sum(changed) < 45
    assert torch.equal(found.sample(0, None)[0], plain)  # not in validation


@torch.no_grad()
def test_silence_around_speech_does_not_change_what_speech_looks_like() -> None:
    encoder = AudioEncoder(AudioEncoderConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32)).eval()
    seen: list[torch.Tensor] = []
    encoder.convolutions[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    speech = torch.randn(40, 80, generator=torch.Generator().manual_seed(0))
    silence = torch.full((60, 80), SILENCE)
    for frames in (speech, torch.cat([silence, speech, silence])):
        encoder(frames[None], torch.tensor([len(frames)]))
    assert torch.allclose(seen[0], seen[1][60:100], atol=1e-3)
    assert torch.isfinite(encoder(silence[None], torch.tensor([60])).log_probs_BSV).all()


def test_utterances_too_short_for_their_text_are_counted(
    babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(babble, folder)
    rows = (folder / "asr.csv").read_text().splitlines()
    rows[1] = rows[1].rsplit(",", 2)[0] + "," + "far too many words " * 8 + ",s0"
    (folder / "asr.csv").write_text("\n".join(rows) + "\n")
    done = run_here(*STAGE, "--config", write_config(config(folder / "asr.csv", tmp_path / "run")), "--max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "1 of " in done.stdout and "left out" in done.stdout
