"""Recordings: any rate, channels and format are one sound; what is no sound is named."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from omni.audio import (
    SILENCE,
    MelConfig,
    add_noise,
    forced_align,
    griffin_lim,
    load_audio,
    log_mel,
    save_wav,
    spec_augment,
    trim_silence,
    warp,
)
from omni.config import UserError


def tone(rate: int, seconds: float = 0.5, pitch: float = 440) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


def frames(path: Path) -> torch.Tensor:
    return log_mel(MelConfig())(load_audio(path))


@pytest.fixture
def reference(tmp_path: Path) -> torch.Tensor:
    soundfile.write(tmp_path / "reference.wav", tone(16000), 16000, subtype="FLOAT")
    return frames(tmp_path / "reference.wav")


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_any_rate_is_the_same_sound(rate: int, reference: torch.Tensor, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", tone(rate), rate)
    found = frames(tmp_path / "x.wav")
    assert found.shape == reference.shape
    middle = slice(5, -5)  # the ends differ by the resampling filter's length
    low = slice(0, 30)  # a tone of 440 Hz lies here; above is only noise
    assert (found - reference)[middle, low].abs().mean() < 0.05
    assert (found[middle].argmax(-1) == reference[middle].argmax(-1)).all()


def test_another_tone_is_another_sound(reference: torch.Tensor, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", tone(16000, pitch=880), 16000)
    assert (frames(tmp_path / "x.wav")[10].argmax(-1) != reference[10].argmax(-1)).all()


@pytest.mark.parametrize(("name", "subtype"), [("x.flac", None), ("x.wav", "PCM_24"), ("x.wav", "FLOAT"),
                                               ("x.wav", "PCM_U8")])  # fmt: skip
def test_formats(name: str, subtype: str | None, reference: torch.Tensor, tmp_path: Path) -> None:
    soundfile.write(tmp_path / name, tone(16000), 16000, subtype=subtype)
    assert (frames(tmp_path / name) - reference)[:, :30].abs().mean() < (0.5 if subtype == "PCM_U8" else 0.05)


def test_stereo_is_mixed(reference: torch.Tensor, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.stack([tone(16000), tone(16000)], 1), 16000, subtype="FLOAT")
    assert (frames(tmp_path / "x.wav") - reference).abs().mean() < 0.05
    # one silent channel halves the sound, and the standard level undoes that
    soundfile.write(tmp_path / "y.wav", np.stack([0 * tone(16000), tone(16000)], 1), 16000, subtype="FLOAT")
    assert (frames(tmp_path / "y.wav") - reference).abs().mean() < 0.05


@pytest.mark.parametrize("gain", [0.02, 0.1, 3.0])
def test_level_does_not_matter(gain: float, reference: torch.Tensor, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", gain * tone(16000), 16000, subtype="FLOAT")
    assert torch.allclose(frames(tmp_path / "x.wav")[:, :30], reference[:, :30], atol=0.01)


def test_silence_stays_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros(8000), 16000)
    assert load_audio(tmp_path / "x.wav").abs().max() == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"", "not a readable recording"),
        (b"this is text, not sound", "not a readable recording"),
    ],
)
def test_what_is_no_recording_is_named(content: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.wav: {expected}"):
        load_audio(path)


def test_samples_that_are_not_finite_or_not_there(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    with pytest.raises(UserError, match=r"nan\.wav: found NaN or Inf"):
        load_audio(tmp_path / "nan.wav")
    with pytest.raises(UserError, match=r"none\.wav: found no samples"):
        load_audio(tmp_path / "none.wav")


def test_frame_rate_is_100_a_second() -> None:
    assert log_mel(MelConfig())(torch.randn(16000)).shape == (100, 80)
    assert log_mel(MelConfig())(torch.randn(2, 16159)).shape == (2, 100, 80)


def test_griffin_lim_undoes_the_spectrogram(reference: torch.Tensor) -> None:
    wave = griffin_lim(reference, MelConfig())
    again = log_mel(MelConfig())(wave)
    size = min(len(again), len(reference))
    assert (again[5 : size - 5].argmax(-1) == reference[5 : size - 5].argmax(-1)).all()


def test_saved_wav_is_clipped_and_read_back(tmp_path: Path) -> None:
    save_wav(tmp_path / "x.wav", torch.tensor([0.5, 2.0, -3.0]), 16000)
    assert load_audio(tmp_path / "x.wav", normalize=False).tolist() == pytest.approx([0.5, 1.0, -1.0], abs=1e-3)


def test_augmentation_masks_and_leaves_the_original() -> None:
    original = torch.randn(200, 80)
    kept = original.clone()
    masked = spec_augment(original, np.random.default_rng(0), 2, 40)
    assert torch.equal(original, kept) and 0 < (masked == 0).float().mean() < 0.7
    assert torch.equal(masked, spec_augment(original, np.random.default_rng(0), 2, 40))


def test_warping_stretches_in_time_and_frequency() -> None:
    frames = torch.zeros(100, 80)
    frames[40:60, 30] = 1.0
    kept, sizes, bands = frames.clone(), set(), set()
    for seed in range(30):
        found = warp(frames, np.random.default_rng(seed), 0.2, least=90)
        assert torch.equal(found, warp(frames, np.random.default_rng(seed), 0.2, least=90))
        sizes.add(len(found))
        bands.add(int(found.sum(0).argmax()))
        loud = (found.sum(1) > 0.1).nonzero()
        assert 0.35 < float(loud[0]) / len(found) < 0.42 and 0.57 < float(loud[-1]) / len(found) < 0.65
    assert torch.equal(frames, kept) and min(sizes) == 90 and 110 < max(sizes) <= 120
    assert 25 <= min(bands) <= 26 and 35 <= max(bands) <= 38
    assert torch.allclose(warp(frames, np.random.default_rng(0), 0.0, least=0), frames)


def test_noise_lies_below_speech_and_between_it() -> None:
    mel = MelConfig()
    front = log_mel(mel)
    loud = front(0.3 * torch.randn(16000, generator=torch.Generator().manual_seed(0)))
    frames = torch.cat([loud, torch.full((50, mel.num_mels), SILENCE), loud])
    kept, sizes, levels = frames.clone(), set(), []
    for seed in range(40):
        found = add_noise(frames, np.random.default_rng(seed), mel)
        assert torch.equal(found, add_noise(frames, np.random.default_rng(seed), mel))
        begin = int((found.mean(1) > 0.6).nonzero()[0])  # the first loud frame
        assert torch.allclose(found[begin + 5 : begin + 95], frames[5:95], atol=0.1)
        gap = front.magnitudes(found[begin + 105 : begin + 145]).square().mean().sqrt()
        levels.append(20 * math.log10(float(gap / front.magnitudes(loud).square().mean().sqrt()) * 0.3 / 0.08))
        sizes.add(len(found) - len(frames))
    assert -62 < min(levels) < -52 and -28 < max(levels) < -17, levels  # dB beside the standard level of speech
    assert torch.equal(frames, kept) and 0 <= min(sizes) < 20 and 40 < max(sizes) <= 60


def test_forced_alignment_finds_the_symbols() -> None:
    path = [0, 1, 1, 0, 2, 2, 2, 0, 2, 0]
    log_probs = torch.full((10, 3), -5.0)
    log_probs[torch.arange(10), torch.tensor(path)] = -0.01
    assert forced_align(log_probs, [1, 2, 2], 0) == [(1, 3), (4, 7), (8, 9)]
    with pytest.raises(ValueError, match="do not fit"):
        forced_align(log_probs[:3], [2, 2, 1], 0)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_an_open_file_is_read_as_its_path_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind.lower()}"
    soundfile.write(path, tone(16000), 16000, format=kind)
    data = path.read_bytes()
    file = io.BytesIO(data)
    file.seek(7)
    assert torch.equal(load_audio(file), load_audio(path))
    with pytest.raises(UserError, match=r"what I said: found 0\.5 s of sound, expected at most 0\.2 s"):
        load_audio(io.BytesIO(data), max_seconds=0.2, name="what I said")
    for broken, said in ((data[: len(data) // 2], "what I said: "), (b"", "an empty file"), (b"hello", "begins with")):
        with pytest.raises(UserError, match=said):
            load_audio(io.BytesIO(broken), name="what I said")


@pytest.mark.parametrize("noise", [0.0, 1e-4, 3e-3])
def test_silence_at_the_ends_is_trimmed(noise: float) -> None:
    torch.manual_seed(0)
    said = 0.3 * torch.sin(torch.arange(8000) / 3) * torch.linspace(0.2, 1, 8000)
    said[3000:5000] = 0  # a pause stays
    whole = torch.cat([torch.zeros(6400), said, torch.zeros(4000)])
    trimmed = trim_silence(whole + noise * torch.randn(len(whole)), 16000)
    assert abs(len(trimmed) - (8000 + 2 * 960)) <= 2 * 160
    assert float(trimmed[1200:3000].abs().mean()) > 0.02
    short = said + noise * torch.randn(8000)
    assert trim_silence(short, 16000) is not None and len(trim_silence(short, 16000)) >= 8000 - 160
    assert len(trim_silence(torch.zeros(5000), 16000)) == 5000
    assert len(trim_silence(said[:100], 16000)) == 100
