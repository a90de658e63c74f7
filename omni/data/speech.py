"""Recordings with their transcripts, for stage B: log-mel frames and CTC targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from omni.audio import MelConfig, load_audio, log_mel, spec_augment
from omni.config import UserError
from omni.data.manifest import Row, raise_problems, read_csv
from omni.data.stream import Batch, pad_to
from omni.parallel import map_small
from omni.runtime import log
from omni.tokenizer import Characters, needed_steps, spoken_text

_CACHE_BYTES = 2 * 2**30  # log-mel frames kept in memory, as fp16: about 37 hours


@dataclass
class SpeechBatch(Batch):
    """Utterances padded to the longest: frames [B, F, M] and CTC symbols [B, S]."""

    frames_BFM: torch.Tensor
    num_frames_B: torch.Tensor
    symbols_BS: torch.Tensor
    num_symbols_B: torch.Tensor


class Recordings:
    """Log-mel frames of the recordings of a manifest, computed when first asked for and then kept in memory."""

    def __init__(self, rows: Sequence[Row], mel: MelConfig, max_seconds: float = 30.0) -> None:
        self.rows, self.mel = list(rows), mel
        self._kept: dict[int, np.ndarray] = {}
        self._bytes = 0
        self.num_frames, problems = [], []
        for row in self.rows:
            try:
                seconds = recording_seconds(row.path("wav"))
            except UserError as error:
                problems.append(f"{row.where}: {error}")
                continue
            if seconds > max_seconds:
                problems.append(f"{row.where}: found {seconds:.1f} s of sound, expected at most {max_seconds:g} s")
            self.num_frames.append(int(seconds * mel.frame_rate))
        raise_problems(problems)

    def __len__(self) -> int:
        return len(self.rows)

    def frames(self, index: int) -> torch.Tensor:
        """Log-mel frames [F, M] of recording ``index``."""
        kept = self._kept.get(index)
        if kept is None:
            wave = load_audio(self.rows[index].path("wav"), self.mel.sample_rate)
            kept = log_mel(self.mel)(wave).half().numpy()
            if self._bytes + kept.nbytes <= _CACHE_BYTES:
                self._kept[index] = kept
                self._bytes += kept.nbytes
        return torch.from_numpy(kept).float()

    def all_frames(self) -> list[torch.Tensor]:
        """Log-mel frames [F, M] of every recording."""
        return map_small(self.frames, range(len(self)))


def recording_seconds(path: Path) -> float:
    """Length of a recording, read from its header.

    Raises:
        UserError: when the file is not a recording or is empty.
    """
    try:
        info = soundfile.info(str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a readable recording ({error}), expected wav, flac, ogg, opus or mp3") from None
    if info.frames == 0:
        raise UserError(f"{path}: found no samples, expected a recording")
    return float(info.frames / info.samplerate)


def read_speech_manifest(path: str | Path) -> list[Row]:
    """Rows of a CSV with the columns wav, text and optionally speaker."""
    return read_csv(Path(path), ["wav", "text"], ["wav"])


class Transcribed:
    """Recordings and the characters that CTC shall find in them.

    Utterances with more characters (and repeats, which need a blank between them) than CTC steps cannot be aligned;
    they are left out, counted in ``infeasible`` and reported.
    """

    def __init__(
        self, rows: Sequence[Row], mel: MelConfig, num_steps: Callable[[int], int], augment: bool, name: str
    ) -> None:
        everything = Recordings(rows, mel)
        self.symbols: list[list[int]] = []
        kept = []
        for row, frames in zip(everything.rows, everything.num_frames, strict=True):
            symbols = Characters().encode(spoken_text(str(row.values["text"])))
            if symbols and needed_steps(symbols) <= num_steps(frames):
                kept.append(row)
                self.symbols.append(symbols)
        self.infeasible = len(rows) - len(kept)
        if self.infeasible:
            log.warning(
                "%s: %d of %d utterances have more characters than CTC steps and are left out",
                name,
                self.infeasible,
                len(rows),
            )
        if not kept:
            raise UserError(f"{name}: no utterance is long enough for its transcript; is the text in the right column?")
        self.recordings = Recordings(kept, mel)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.recordings)

    @property
    def lengths(self) -> list[int]:
        """Frames of each utterance, for batches of similar length."""
        return self.recordings.num_frames

    def text(self, index: int) -> str:
        """The transcript as written in the manifest."""
        return str(self.recordings.rows[index].values["text"])

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[torch.Tensor, list[int]]:
        """Frames [F, M], masked by SpecAugment in training, and symbols."""
        frames = self.recordings.frames(index)
        if rng is not None and self.augment:
            frames = spec_augment(frames, rng, num_masks=2, width=16)
        return frames, self.symbols[index]

    def collate(self, samples: list[Any]) -> SpeechBatch:
        """Pad frames to a multiple of 32, so that the CPU sees few shapes."""
        frames_BFM, num_frames_B = pad_frames([frames for frames, _ in samples])
        num_symbols_B = torch.tensor([len(symbols) for _, symbols in samples])
        symbols_BS = torch.full((len(samples), int(num_symbols_B.max())), Characters.pad)
        for row, (_, symbols) in enumerate(samples):
            symbols_BS[row, : len(symbols)] = torch.tensor(symbols)
        counts = {"characters": int(num_symbols_B.sum()), "frames": int(num_frames_B.sum())}
        return SpeechBatch(counts, frames_BFM, num_frames_B, symbols_BS, num_symbols_B)


def pad_frames(frames: Sequence[torch.Tensor], multiple: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of several recordings as one tensor [B, F, M] and their numbers [B]."""
    sizes = torch.tensor([len(item) for item in frames])
    padded = torch.zeros(len(frames), pad_to(int(sizes.max()), multiple), frames[0].shape[1])
    for row, item in enumerate(frames):
        padded[row, : len(item)] = item
    return padded, sizes
