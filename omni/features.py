"""Encoder features of pictures and recordings, computed once while the encoders are frozen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni.audio import load_audio, log_mel
from omni.cache import cache_key, through_cache
from omni.config import DataConfig, UserError
from omni.data.images import load_image
from omni.data.manifest import RULES
from omni.data.speech import pad_frames
from omni.models.audio_encoder import AudioEncoder
from omni.models.omni import OmniModel
from omni.models.vision_encoder import VisionEncoder
from omni.parallel import map_small


class UnusableMediaError(UserError):
    """Pictures or recordings that cannot be read, by path."""

    def __init__(self, problems: dict[str, str]) -> None:
        super().__init__("\n".join(problems.values()))
        self.problems = problems


class FeatureStore:
    """Features by path, kept in memory as fp16 and, with ``cache``, in one file a modality on disk.

    For another encoder, a changed recording or another precision all is encoded anew (:func:`omni.cache.cache_key`).
    """

    def __init__(self, model: OmniModel, cache: Path | None = None, rules: DataConfig = RULES) -> None:
        self.model, self.cache, self.rules = model, cache, rules
        self._images: dict[str, torch.Tensor] = {}
        self._audios: dict[str, torch.Tensor] = {}

    def add(self, images: Iterable[str], audios: Iterable[str]) -> None:
        """Encode what is not there yet.

        Raises:
            UnusableMediaError: when some of it cannot be read.
        """
        seeing, hearing = self.model.vision_encoder, self.model.audio_encoder
        see = functools.partial(encode_images, max_pixels=self.rules.max_pixels)
        self._images |= self._encoded("images", see, seeing, _new(images, self._images))
        self._audios |= self._encoded("audio", encode_recordings, hearing, _new(audios, self._audios))

    def image(self, path: str) -> torch.Tensor:
        """Patch tokens [P, D]."""
        return self._images[path].float()

    def audio(self, path: str) -> torch.Tensor:
        """Audio encoder states [T, D]."""
        return self._audios[path].float()

    def audio_positions(self, path: str) -> int:
        """Positions that a recording takes in the Thinker's sequence."""
        return self.model.audio_positions(len(self._audios[path]))

    def _encoded(
        self, kind: str, encode: Callable[[Any, list[str]], list[torch.Tensor]], encoder: nn.Module, paths: list[str]
    ) -> dict[str, torch.Tensor]:
        """Features of ``paths``, from the disk if they are there."""
        if not paths:
            return {}
        folders = [] if self.cache is None else [self.cache]
        key = cache_key([encoder], paths)
        found = through_cache(
            folders, f"features-{kind}", key, lambda: [item.half() for item in encode(encoder, paths)]
        )
        return dict(zip(paths, found, strict=True))


def _new(paths: Iterable[str], known: dict[str, torch.Tensor]) -> list[str]:
    return sorted({path for path in paths if path not in known})


def _load(load: Callable[[str], torch.Tensor], paths: Sequence[str]) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Read files; what was read, and what is wrong with the others."""

    def attempt(path: str) -> torch.Tensor | UserError:
        try:
            return load(path)
        except UserError as error:
            return error

    found = map_small(attempt, paths)
    problems = {path: str(item) for path, item in zip(paths, found, strict=True) if isinstance(item, UserError)}
    return [item for item in found if isinstance(item, torch.Tensor)], problems


def encode_images(
    encoder: VisionEncoder, paths: Sequence[str], batch_size: int = 128, max_pixels: int = RULES.max_pixels
) -> list[torch.Tensor]:
    """Patch tokens [P, D] of each picture, on the CPU."""
    found, problems = list[torch.Tensor](), dict[str, str]()
    read = functools.partial(load_image, size=encoder.config.image_size, max_pixels=max_pixels)
    for start in range(0, len(paths), batch_size):
        pixels, bad = _load(read, paths[start : start + batch_size])
        problems |= bad
        if not problems:  # else it is enough to know what else is wrong
            found += encode_pixels(encoder, pixels)
    if problems:
        raise UnusableMediaError(problems)
    return found


@torch.no_grad()
def encode_pixels(encoder: VisionEncoder, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Patch tokens [P, D] of each picture, given as uint8 [3, image_size, image_size], on the CPU."""
    device = next(encoder.parameters()).device
    return list(encoder.encode_image(torch.stack(list(pixels)).to(device)).patches_BPD.float().cpu())


def encode_recordings(encoder: AudioEncoder, paths: Sequence[str], batch_size: int = 32) -> list[torch.Tensor]:
    """States [T, D] of each recording, on the CPU; batches hold recordings of similar length."""
    front = log_mel(encoder.config.mel)
    frames, problems = _load(lambda path: front(load_audio(path, encoder.config.mel.sample_rate)), paths)
    if problems:
        raise UnusableMediaError(problems)
    return encode_frames(encoder, frames, batch_size)


@torch.no_grad()
def encode_frames(encoder: AudioEncoder, frames: Sequence[torch.Tensor], batch_size: int = 32) -> list[torch.Tensor]:
    """States [T, D] of each recording, given as log-mel frames [F, M], on the CPU."""
    device = next(encoder.parameters()).device
    order = sorted(range(len(frames)), key=lambda index: len(frames[index]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(frames)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        frames_BFM, num_frames_B = pad_frames([frames[index] for index in rows])
        output = encoder(frames_BFM.to(device), num_frames_B.to(device))
        for index, states, size in zip(
            rows, output.states_BTD.float().cpu(), output.num_states_B.tolist(), strict=True
        ):
            found[index] = states[:size].clone()
    return found
