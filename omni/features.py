"""Encoder features of pictures and recordings, computed once while the encoders are frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from omni.audio import load_audio, log_mel
from omni.data.images import load_image
from omni.data.speech import pad_frames
from omni.models.audio_encoder import AudioEncoder
from omni.models.omni import OmniModel
from omni.models.vision_encoder import VisionEncoder


class FeatureStore:
    """Features by path, kept in memory as fp16 and, with ``cache``, in one file a modality on disk.

    The file's name carries a hash of the encoder's weights, of every path, size and time of change, and of whether
    autocast is on, so that for another encoder, a changed recording or another precision all is encoded anew.
    """

    def __init__(self, model: OmniModel, cache: Path | None = None) -> None:
        self.model, self.cache = model, cache
        self._images: dict[str, torch.Tensor] = {}
        self._audios: dict[str, torch.Tensor] = {}

    def add(self, images: Iterable[str], audios: Iterable[str]) -> None:
        """Encode what is not there yet."""
        self._images |= self._through_cache("images", _new(images, self._images), self._encode_images)
        self._audios |= self._through_cache("audio", _new(audios, self._audios), self._encode_audios)

    def image(self, path: str) -> torch.Tensor:
        """Patch tokens [P, D]."""
        return self._images[path].float()

    def audio(self, path: str) -> torch.Tensor:
        """Audio encoder states [T, D]."""
        return self._audios[path].float()

    def audio_positions(self, path: str) -> int:
        """Positions that a recording takes in the Thinker's sequence."""
        return self.model.audio_positions(len(self._audios[path]))

    def _encode_images(self, paths: Sequence[str]) -> list[torch.Tensor]:
        return encode_images(self.model.vision_encoder, paths)

    def _encode_audios(self, paths: Sequence[str]) -> list[torch.Tensor]:
        return encode_recordings(self.model.audio_encoder, paths)

    def _through_cache(self, kind: str, paths: list[str], encode) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
        if not paths:
            return {}
        encoder = self.model.vision_encoder if kind == "images" else self.model.audio_encoder
        file = None if self.cache is None else self.cache / f"features-{kind}-{_key(encoder, paths)}.npz"
        if file is not None and file.exists():
            with np.load(file) as kept:
                return {path: torch.from_numpy(kept[str(i)]) for i, path in enumerate(paths)}
        found = [item.half() for item in encode(paths)]
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, **{str(i): item.numpy() for i, item in enumerate(found)})
            partial.replace(file)
        return dict(zip(paths, found, strict=True))


def _new(paths: Iterable[str], known: dict[str, torch.Tensor]) -> list[str]:
    return sorted({path for path in paths if path not in known})


def _key(encoder: torch.nn.Module, paths: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for weight in encoder.state_dict().values():
        digest.update(weight.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    for path in paths:
        status = Path(path).stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    digest.update(str(torch.is_autocast_enabled(next(encoder.parameters()).device.type)).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_images(encoder: VisionEncoder, paths: Sequence[str], batch_size: int = 128) -> list[torch.Tensor]:
    """Patch tokens [P, D] of each picture, on the CPU."""
    device, found = next(encoder.parameters()).device, []
    for start in range(0, len(paths), batch_size):
        pixels = [load_image(path, encoder.config.image_size) for path in paths[start : start + batch_size]]
        found += list(encoder.encode_image(torch.stack(pixels).to(device)).patches_BPD.float().cpu())
    return found


@torch.no_grad()
def encode_recordings(encoder: AudioEncoder, paths: Sequence[str], batch_size: int = 32) -> list[torch.Tensor]:
    """States [T, D] of each recording, on the CPU; batches hold recordings of similar length."""
    device, front = next(encoder.parameters()).device, log_mel(encoder.config.mel)
    frames = [front(load_audio(path, encoder.config.mel.sample_rate)) for path in paths]
    order = sorted(range(len(paths)), key=lambda index: len(frames[index]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(paths)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        frames_BFM, num_frames_B = pad_frames([frames[index] for index in rows])
        output = encoder(frames_BFM.to(device), num_frames_B.to(device))
        for index, states, size in zip(
            rows, output.states_BTD.float().cpu(), output.num_states_B.tolist(), strict=True
        ):
            found[index] = states[:size].clone()
    return found
