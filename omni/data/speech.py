"""Recordings with their transcripts, for stage B: log-mel frames and CTC targets."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from omni.audio import MelConfig, add_noise, load_audio, log_mel, recording_seconds, spec_augment, warp
from omni.config import DataConfig, UserError
from omni.data.manifest import RULES, Manifest, Row, manifest_of, scan_csv, settle
from omni.data.stream import Batch, pad_to
from omni.parallel import map_small
from omni.runtime import log
from omni.tokenizer import Characters, needed_steps, spoken_text

CACHE_BYTES = 2 * 2**30  # log-mel frames kept in memory, as fp16: about 37 hours


@dataclass
class SpeechBatch(Batch):
    """Utterances padded to the longest: frames [B, F, M], CTC symbols [B, S], and the transcripts as written."""

    frames_BFM: torch.Tensor
    num_frames_B: torch.Tensor
    symbols_BS: torch.Tensor
    num_symbols_B: torch.Tensor
    texts: list[str]


class Recordings:
    """Log-mel frames of the recordings of a manifest, kept in memory as far as they fit.

    All are decoded (beyond that, their headers read) before training begins, so that a damaged file is known before
    hours have passed, and every one of them is named.

    Args:
        rows: of a manifest; those whose recording is damaged or too long are an error or left out, as the rules say.
        mel: how frames are computed.
        rules: the limits of the data.
        name: of the data, for messages; by default the first row's manifest.
        decode: False: read headers alone, and decode what is asked for; for recordings that another stage has read.
    """

    def __init__(
        self, rows: Sequence[Row], mel: MelConfig, rules: DataConfig = RULES, name: str = "", decode: bool = True
    ) -> None:
        self.mel = mel
        self._room = CACHE_BYTES // (2 * mel.num_mels)  # frames that may still be kept
        found = self._read_all(rows, rules, decode)
        problems = [item for item in found if isinstance(item, str)]
        settle(problems, len(problems), len(rows), rules, name or (manifest_of(rows[0]) if rows else ""))
        good = [(row, item) for row, item in zip(rows, found, strict=True) if not isinstance(item, str)]
        self.rows, self.left_out = [row for row, _ in good], len(problems)
        self.num_frames = [item if isinstance(item, int) else len(item) for _, item in good]
        self._kept = {index: item for index, (_, item) in enumerate(good) if not isinstance(item, int)}
        self._room -= sum(map(len, self._kept.values()))

    def _read_all(self, rows: Sequence[Row], rules: DataConfig, decode: bool) -> list[np.ndarray | int | str]:
        """Frames [F, M] of every recording; their number alone once the memory is full; or what is wrong with it."""

        def read(row: Row, decode: bool) -> np.ndarray | int | str:
            try:
                seconds = recording_seconds(row.path("wav"), rules.max_audio_seconds)
                return self._compute(row) if decode else int(seconds * self.mel.frame_rate)
            except UserError as error:
                return f"{row.where}: {error}"

        sizes = map_small(lambda row: read(row, decode=False), rows)
        if not decode:
            return sizes
        total = itertools.accumulate(size if isinstance(size, int) else 0 for size in sizes)
        plan = zip(rows, sizes, total, strict=True)
        return map_small(
            lambda item: read(item[0], True) if isinstance(item[1], int) and item[2] <= self._room else item[1], plan
        )

    def _compute(self, row: Row) -> np.ndarray:
        """Frames [F, M] in half precision."""
        return log_mel(self.mel)(load_audio(row.path("wav"), self.mel.sample_rate)).half().numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, indices: Sequence[int]) -> None:
        """Forget all recordings but these."""
        self.rows = [self.rows[index] for index in indices]
        self.num_frames = [self.num_frames[index] for index in indices]
        self._kept = {new: self._kept[old] for new, old in enumerate(indices) if old in self._kept}

    def frames(self, index: int, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Log-mel frames [F, M] of recording ``index``, or those from ``start`` to ``end`` (exclusive)."""
        found = self._kept.get(index)
        if found is None:
            found = self._compute(self.rows[index])
            if len(found) <= self._room:
                self._kept[index] = found
                self._room -= len(found)
        return torch.from_numpy(found[start:end]).float()

    def all_frames(self) -> list[torch.Tensor]:
        """Log-mel frames [F, M] of every recording."""
        return map_small(self.frames, range(len(self)))


def scan_speech_manifest(path: str | Path, rules: DataConfig = RULES) -> Manifest[Row]:
    """Rows and problems of a CSV with the columns wav, text and optionally speaker."""
    return scan_csv(Path(path), ["wav", "text"], ["wav"], rules)


def read_speech_manifest(path: str | Path, rules: DataConfig = RULES) -> list[Row]:
    """Rows of a CSV with the columns wav, text and optionally speaker.

    Raises:
        UserError: listing every row that is not like that, unless the rules leave them out.
    """
    return scan_speech_manifest(path, rules).usable(rules)


class Augmentation(NamedTuple):
    """How training changes what it hears.

    Attributes:
        masks: whether bands are masked (SpecAugment).
        warp: by which share frames are stretched at most.
        noise: the share of recordings that are heard with noise.
    """

    masks: bool = False
    warp: float = 0.0
    noise: float = 0.0


class Transcribed:
    """Recordings and the characters that CTC shall find in them.

    Utterances with more characters (and repeats, which need a blank between them) than CTC steps cannot be aligned;
    they are left out, counted in ``infeasible`` and reported.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        mel: MelConfig,
        num_steps: Callable[[int], int],
        augment: Augmentation,
        name: str,
        rules: DataConfig = RULES,
    ) -> None:
        self.recordings = Recordings(rows, mel, rules, name)
        everything = [Characters().encode(spoken_text(str(row.values["text"]))) for row in self.recordings.rows]
        kept = [
            index
            for index, (symbols, frames) in enumerate(zip(everything, self.recordings.num_frames, strict=True))
            if symbols and needed_steps(symbols) <= num_steps(frames)
        ]
        self.infeasible = len(everything) - len(kept)
        if self.infeasible:
            log.warning(
                "%s: %d of %d utterances have more characters than CTC steps and are left out",
                name,
                self.infeasible,
                len(everything),
            )
        if not kept:
            raise UserError(f"{name}: no utterance is long enough for its transcript; is the text in the right column?")
        self.recordings.only(kept)
        self.symbols = [everything[index] for index in kept]
        self.augment = augment
        self._num_steps = num_steps

    def __len__(self) -> int:
        return len(self.recordings)

    @property
    def lengths(self) -> list[int]:
        """Frames of each utterance, for batches of similar length."""
        return self.recordings.num_frames

    def where(self, index: int) -> str:
        """``file:line`` of an utterance."""
        return self.recordings.rows[index].where

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[torch.Tensor, list[int], str]:
        """Frames [F, M], changed at random in training, symbols, and the transcript as written."""
        frames, symbols = self.recordings.frames(index), self.symbols[index]
        if rng is not None and self.augment.warp:
            frames = warp(frames, rng, self.augment.warp, self._least_frames(index))
        if rng is not None and self.augment.noise and rng.random() < self.augment.noise:
            frames = add_noise(frames, rng, self.recordings.mel)
        if rng is not None and self.augment.masks:
            frames = spec_augment(frames, rng, num_masks=2, width=16)
        return frames, symbols, str(self.recordings.rows[index].values["text"])

    def _least_frames(self, index: int) -> int:
        """Frames that the transcript of an utterance needs; it has them."""
        needed, num_frames = needed_steps(self.symbols[index]), self.recordings.num_frames[index]
        return bisect.bisect_left(range(num_frames), needed, key=self._num_steps)

    def collate(self, samples: list[Any]) -> SpeechBatch:
        """Pad frames to a multiple of 16, so that the CPU sees few shapes: 41 in nano's recordings, 6 % of padding."""
        frames_BFM, num_frames_B = pad_frames([frames for frames, _, _ in samples])
        num_symbols_B = torch.tensor([len(symbols) for _, symbols, _ in samples])
        symbols_BS = torch.full((len(samples), int(num_symbols_B.max())), Characters.pad)
        for row, (_, symbols, _) in enumerate(samples):
            symbols_BS[row, : len(symbols)] = torch.tensor(symbols)
        counts = {"characters": int(num_symbols_B.sum()), "frames": int(num_frames_B.sum())}
        texts = [text for _, _, text in samples]
        return SpeechBatch(counts, frames_BFM, num_frames_B, symbols_BS, num_symbols_B, texts)


def pad_frames(frames: Sequence[torch.Tensor], multiple: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of several recordings as one tensor [B, F, M] and their numbers [B]."""
    sizes = torch.tensor([len(item) for item in frames])
    padded = torch.zeros(len(frames), pad_to(int(sizes.max()), multiple), frames[0].shape[1])
    for row, item in enumerate(frames):
        padded[row, : len(item)] = item
    return padded, sizes
