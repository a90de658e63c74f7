"""Sound in and out: loading, level, log-mel spectrograms, Griffin-Lim. The only module that imports torchaudio.

One 100 Hz log-mel front end serves the audio encoder, the codec, the vocoder and the speaker encoder, so every frame
rate of the project divides it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import nn

from omni.config import Problem, UserError
from omni.files import describe_content, file_problem
from omni.sound_files import cut_off, too_few_samples

try:
    import torchaudio
except (ImportError, OSError, RuntimeError) as error:
    raise UserError(
        f"torchaudio cannot be loaded beside this torch ({error}); take torch, torchaudio and torchvision from one "
        "index, with torch below 2.14: `make setup` does"
    ) from error

# Level of every waveform (RMS over the louder half of its 20 ms frames): recordings differ 15-fold and more.
_LEVEL = 0.08
# Log-mel values of speech at that level, measured on the micro-world: zero mean and about unit variance after this.
# The mean matters: with frames centred at 1.3 instead, CTC had a CER of 0.87 after 100 steps where it has 0.46 now.
_CENTRE, _SPREAD = -2.2, 3.0
_NOISE_SECONDS = 10
# libsndfile's length of a FLAC that was written to a pipe, whose header does not say; read in blocks of samples
_UNKNOWN_LENGTH, _BLOCK = 2**62, 2**16
GRIFFIN_LIM_ITERATIONS = (
    16  # mel frames of the sound differ by 0.100 (log scale) after 8, 0.085 after 16, 0.076 after 32
)
SILENCE = (math.log(1e-5) - _CENTRE) / _SPREAD  # normalized log-mel of digital silence


@dataclass(frozen=True)
class MelConfig:
    """A log-mel spectrogram."""

    sample_rate: int = 16000
    n_fft: int = 512
    hop_length: int = 160
    num_mels: int = 80

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop_length

    def problems(self) -> Iterator[Problem]:
        """Settings that give no spectrogram."""
        if self.n_fft < 2 * self.hop_length:
            yield Problem("n_fft", str(self.n_fft), f"at least twice hop_length ({self.hop_length})")


def recording_seconds(path: str | Path, max_seconds: float = math.inf) -> float:
    """Length of a recording in seconds, read from its header; nothing is decoded unless the header does not say.

    Raises:
        UserError: naming the file, when it is missing, empty, not audio, cut off or longer than ``max_seconds``.
    """
    with _opened(Path(path), str(path), max_seconds) as file:
        if file.frames < _UNKNOWN_LENGTH:
            return float(file.frames / file.samplerate)
        return sum(map(len, _blocks(file, str(path), max_seconds))) / float(file.samplerate)


def load_audio(
    source: str | Path | BinaryIO,
    sample_rate: int = 16000,
    normalize: bool = True,
    max_seconds: float = math.inf,
    name: str = "",
) -> torch.Tensor:
    """A recording as mono float samples [samples] at ``sample_rate``, at a standard level unless told otherwise.

    Args:
        source: a path or an open binary file.
        sample_rate: of the result.
        normalize: whether it is brought to the standard level.
        max_seconds: longer ones are refused by the header, before they are decoded.
        name: what to call the recording in messages; the path by default.

    Raises:
        UserError: naming the file, when it is missing, empty, not audio, cut off, longer than ``max_seconds``, or holds
            NaN or Inf.
    """
    name, source = name or str(source), Path(source) if isinstance(source, str) else source
    with _opened(source, name, max_seconds) as file:
        rate, num_declared, container = file.samplerate, file.frames, file.format
        blocks = list(_blocks(file, name, max_seconds))
    samples = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    if num_declared < _UNKNOWN_LENGTH and too_few_samples(len(samples), num_declared, container):
        found = f"found {len(samples)} of the {num_declared} samples that its header names"
        raise UserError(f"{name}: cut off: {found}, expected a whole recording")
    wave = torch.from_numpy(np.ascontiguousarray(samples.mean(axis=1)))
    if not torch.isfinite(wave).all():
        raise UserError(f"{name}: found NaN or Inf samples, expected finite ones")
    wave = resample(wave, rate, sample_rate)
    return standard_level(wave) if normalize else wave


def _opened(source: Path | BinaryIO, name: str, max_seconds: float) -> soundfile.SoundFile:
    """A recording whose header could be read and names no more than ``max_seconds``."""
    problem = file_problem(source) if isinstance(source, Path) else ""
    if problem and problem != "found an empty file":
        raise UserError(f"{name}: {problem.rstrip(':')}, expected wav, flac, ogg, opus or mp3")
    try:
        file = soundfile.SoundFile(_for_soundfile(source))
    except (RuntimeError, OSError, TypeError) as error:
        kind = describe_content(source)
        reason = f"{kind}, which cannot be decoded: {error}" if kind.endswith("recording") else kind
        expected = "expected wav, flac, ogg, opus or mp3"
        raise UserError(f"{name}: not a readable recording (found {reason}), {expected}") from None
    position = None if isinstance(source, Path) else source.tell()
    if missing := cut_off(source):
        raise UserError(f"{name}: cut off: {missing}, expected a whole recording")
    if position is not None and not isinstance(source, Path):
        source.seek(position)  # libsndfile reads on from where it was
    if file.frames == 0:
        raise UserError(f"{name}: found no samples, expected a recording")
    if file.frames >= _UNKNOWN_LENGTH:
        file.close()
        return _Stream(_for_soundfile(source))
    _check_length(file.frames, file, name, max_seconds)
    return file


def _for_soundfile(source: Path | BinaryIO) -> str | BinaryIO:
    """What soundfile opens: a name, or a file at its beginning."""
    if isinstance(source, Path):
        return str(source)
    source.seek(0)
    return source


class _Stream(soundfile.SoundFile):
    """A recording that is read from its beginning to its end: libsndfile cannot seek where it knows no length."""

    def seekable(self) -> bool:
        """Keeps soundfile from seeking after each block."""
        return False


def _blocks(file: soundfile.SoundFile, name: str, max_seconds: float) -> Iterator[np.ndarray]:
    """Samples [S, channels]: all at once, or in pieces where the header does not say how many there are."""
    known, total = file.frames < _UNKNOWN_LENGTH, 0
    while True:
        try:
            block = file.read(-1 if known else _BLOCK, dtype="float32", always_2d=True)
        except (RuntimeError, OSError, MemoryError) as error:
            raise UserError(f"{name}: damaged or cut off ({error}), expected a whole recording") from None
        total += len(block)
        _check_length(total, file, name, max_seconds)
        yield block
        if known or len(block) < _BLOCK:
            return


def _check_length(num_samples: int, file: soundfile.SoundFile, name: str, max_seconds: float) -> None:
    seconds = num_samples / file.samplerate
    if seconds > max_seconds:
        limit = f"expected at most {max_seconds:g} s (data.max_audio_seconds)"
        raise UserError(f"{name}: found {seconds:.1f} s of sound, {limit}")


def resample(wave: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """Change the sampling rate."""
    return wave if rate == new_rate else _resampler(rate, new_rate)(wave)


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, new_rate: int) -> nn.Module:
    # keeping it saves building its kernel each time: 6 ms instead of 150
    return torchaudio.transforms.Resample(rate, new_rate)


def standard_level(wave: torch.Tensor) -> torch.Tensor:
    """Scale a waveform so that its louder half has an RMS of 0.08; silence stays silence."""
    frames = wave[: len(wave) // 320 * 320].view(-1, 320) if len(wave) >= 320 else wave[None]
    power = frames.square().mean(dim=1)
    loud = power.sort(descending=True).values[: max(1, len(power) // 2)].mean().sqrt()
    if loud < 1e-6:
        return wave
    return (wave * (_LEVEL / loud)).clamp(-1, 1)


def trim_silence(wave: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Leave out what is silent at both ends of a recording, but for 60 ms each, as much as the micro-world's have.

    Silent is what is 46 dB below the loudest 10 ms, or hardly louder than the quietest ones if these are 20 dB below.
    """
    size = sample_rate // 100
    if len(wave) < 2 * size:
        return wave
    power_F = wave[: len(wave) // size * size].view(-1, size).square().mean(dim=1)
    loudest, quietest = power_F.max(), power_F.quantile(0.05)
    floor = torch.maximum(loudest * 10**-4.6, torch.minimum(4 * quietest, loudest * 10**-2))
    loud = (power_F > floor).nonzero()
    if not len(loud):
        return wave
    return wave[max(0, (int(loud[0]) - 6) * size) : (int(loud[-1]) + 7) * size]


class LogMel(nn.Module):
    """Waveforms to normalized log-mel frames.

    ``(log(mel + 1e-5) + 2.2) / 3``: fixed constants bring the values of speech to about zero mean and unit variance,
    and unlike per-utterance statistics they can be undone by a vocoder.
    """

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = torchaudio.transforms.MelSpectrogram(
            config.sample_rate,
            config.n_fft,
            hop_length=config.hop_length,
            n_mels=config.num_mels,
            power=1.0,
            center=True,
        )

    @torch.no_grad()
    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """[..., samples] to [..., F, M] with F = samples // hop_length, in fp32 whatever autocast says."""
        with torch.autocast(wave.device.type, enabled=False):
            mel = self.mel(wave.float())[..., : wave.shape[-1] // self.config.hop_length]
            return self.normalized(mel.transpose(-1, -2))

    def normalized(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Mel magnitudes [..., F, M] to normalized log-mel frames."""
        return ((magnitudes + 1e-5).log() - _CENTRE).div(_SPREAD)

    def magnitudes(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Undo the normalization: [..., F, M] to mel magnitudes."""
        return (log_mel.float() * _SPREAD + _CENTRE).exp() - 1e-5


@functools.lru_cache(maxsize=4)
def log_mel(config: MelConfig) -> LogMel:
    """The front end of a configuration, built once."""
    return LogMel(config)


@torch.no_grad()
def griffin_lim(frames_FM: torch.Tensor, config: MelConfig, iterations: int = GRIFFIN_LIM_ITERATIONS) -> torch.Tensor:
    """A waveform [..., samples] for log-mel frames [..., F, M] by Griffin and Lim's method (1984); needs no training.

    All phases start at zero, so that a sample depends on its neighbourhood alone (:func:`griffin_lim_look_ahead`).
    """
    num_frames = frames_FM.shape[-2]
    least = config.n_fft // (2 * config.hop_length) + 2  # the transform reflects half a window at either end
    frames_FM = nn.functional.pad(frames_FM, (0, 0, 0, max(0, least - num_frames)), value=SILENCE)
    front = log_mel(config)
    inverse = torch.linalg.pinv(front.mel.mel_scale.fb.T)  # [bins, M]
    spectrum = (inverse @ front.magnitudes(frames_FM).clamp(min=0).transpose(-1, -2)).clamp(min=0)
    transform = torchaudio.transforms.GriffinLim(
        config.n_fft, n_iter=iterations, hop_length=config.hop_length, power=1.0, rand_init=False
    )
    wave: torch.Tensor = transform(spectrum)
    return wave[..., : num_frames * config.hop_length]


def griffin_lim_look_ahead(config: MelConfig, iterations: int = GRIFFIN_LIM_ITERATIONS) -> int:
    """Frames that a frame's samples depend on beyond it, and as many before it: an overlap for each iteration."""
    return (iterations + 1) * ((config.n_fft - 1) // config.hop_length)


def save_wav(path: str | Path, wave: torch.Tensor, sample_rate: int) -> None:
    """Write mono 16-bit WAV; samples beyond [-1, 1] are clipped."""
    soundfile.write(str(path), wave.detach().float().clamp(-1, 1).cpu().numpy(), sample_rate, subtype="PCM_16")


def spec_augment(frames_FM: torch.Tensor, rng: np.random.Generator, num_masks: int, width: int) -> torch.Tensor:
    """Mask bands of frames and of mels (SpecAugment, Park et al., 2019) with random numbers of the sample's own."""
    masked = frames_FM.clone()
    F_, M = masked.shape
    for _ in range(num_masks):
        start, size = int(rng.integers(0, F_)), int(rng.integers(0, min(width, F_ // 8) + 1))
        masked[start : start + size] = 0
        start, size = int(rng.integers(0, M)), int(rng.integers(0, M // 6 + 1))
        masked[:, start : start + size] = 0
    return masked


def add_noise(frames_FM: torch.Tensor, rng: np.random.Generator, mel: MelConfig) -> torch.Tensor:
    """A recording as a microphone in a room would have it: up to 0.3 s more at either end, and noise all over.

    Noise 20 to 60 dB below the standard level of speech, white but for a tilt of up to 12 dB across the mels; powers
    add. On frames, so that recordings are transformed once (on waveforms: "noise corruption" of Ko et al., 2015).

    Args:
        frames_FM: log-mel frames.
        rng: random numbers of the sample's own.
        mel: their shape.

    Returns:
        Log-mel frames, more of them.
    """
    front = log_mel(mel)
    ends = rng.integers(0, 3 * mel.sample_rate // (10 * mel.hop_length) + 1, 2)
    magnitudes_FM = nn.functional.pad(front.magnitudes(frames_FM), (0, 0, int(ends[0]), int(ends[1])))
    level = 10 ** (-rng.uniform(20, 60) / 20)
    tilt_M = torch.linspace(-1, 1, mel.num_mels).mul(float(rng.uniform(-1, 1)) * math.log(2)).exp()
    white_FM = _white_noise(mel)
    start = int(rng.integers(0, len(white_FM)))
    noise_FM = white_FM[(start + torch.arange(len(magnitudes_FM))) % len(white_FM)]
    return front.normalized(torch.hypot(magnitudes_FM, noise_FM * (level * tilt_M)))


@functools.lru_cache(maxsize=4)
def _white_noise(mel: MelConfig) -> torch.Tensor:
    """Mel magnitudes [F, M] of white noise as loud as speech at the standard level."""
    wave = torch.randn(_NOISE_SECONDS * mel.sample_rate, generator=torch.Generator().manual_seed(0)) * _LEVEL
    front = log_mel(mel)
    return front.magnitudes(front(wave))


def warp(frames_FM: torch.Tensor, rng: np.random.Generator, share: float, least: int) -> torch.Tensor:
    """Another speaker and another pace: frames stretched in time and in frequency, by factors of 1 +- ``share`` each.

    Speed perturbation (Ko et al., 2015) and vocal tract length perturbation (Jaitly and Hinton, 2013) on the mel axis.

    Args:
        frames_FM: log-mel frames.
        rng: random numbers of the sample's own.
        share: of the largest change.
        least: frames that must be left, for a transcript to fit.
    """
    pace, pitch = rng.uniform(1 - share, 1 + share, 2)
    num_frames, num_mels = frames_FM.shape
    size = max(round(num_frames * pace), min(least, num_frames))
    stretched_MF = nn.functional.interpolate(frames_FM.T[None], size=size, mode="linear")[0]
    place_M = (torch.arange(num_mels) * pitch).clamp(max=num_mels - 1)
    below_M = place_M.floor().long().clamp(max=num_mels - 2)
    return torch.lerp(stretched_MF[below_M], stretched_MF[below_M + 1], (place_M - below_M)[:, None].float()).T


def forced_align(log_probs_FV: torch.Tensor, targets: list[int], blank: int) -> list[tuple[int, int]]:
    """First and one-past-last frame of each target symbol on the best CTC path.

    Args:
        log_probs_FV: CTC log-probabilities of one utterance.
        targets: its symbols, none blank.
        blank: the blank symbol.

    Raises:
        ValueError: when the frames are too few for the symbols.
    """
    if len(targets) + sum(a == b for a, b in itertools.pairwise(targets)) > len(log_probs_FV):
        raise ValueError(f"{len(targets)} symbols do not fit into {len(log_probs_FV)} frames")
    path, scores = torchaudio.functional.forced_align(
        log_probs_FV[None].float().cpu(), torch.tensor([targets], dtype=torch.int32), blank=blank
    )
    spans = torchaudio.functional.merge_tokens(path[0], scores[0], blank=blank)
    return [(span.start, span.end) for span in spans]
