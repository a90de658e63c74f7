"""How much of its data a stage keeps in the main memory, told from manifests and headers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omni.audio import MelConfig, recording_seconds
from omni.config import DataConfig, UserError, from_dict
from omni.data.images import CACHE_BYTES as PICTURE_BYTES
from omni.data.manifest import Row
from omni.data.speech import CACHE_BYTES as FRAME_BYTES
from omni.data.speech import scan_speech_manifest
from omni.models.audio_encoder import AudioEncoderConfig
from omni.models.vision_encoder import VisionConfig
from omni.parallel import map_small
from omni.summary import read_summary

Shape = TypeVar("Shape")
LENIENT = DataConfig(on_bad_sample="skip", max_bad_fraction=1.0, allow_outside_paths=True, allow_leaks=True)
_ASKED = 200  # recordings of chats whose headers are read; the others are taken to be as long


def data_memory(kind: str, values: dict[str, Any]) -> int | None:
    """Bytes of decoded data that the stage which leaves ``<kind>.pt`` keeps; None where the data are not there yet."""
    data = values["data"]
    paths = [path for path in (data["train"], data["val"]) if path]
    if not all(Path(path).exists() for path in paths):
        return None
    if kind == "thinker":
        return sum(_file_bytes(Path(path)) for path in paths)
    if kind == "vision":
        many, size = sum(_num_entries(path) for path in paths), values["model"]["image_size"]
        return min(PICTURE_BYTES * len(paths), many * 3 * size * size)
    if kind == "omni":
        return _features(values, paths)
    mel = from_dict(MelConfig, values["model"]["mel"], "model.mel")
    total = 0
    for path in paths:
        seconds = sum(map_small(seconds_of, rows_of(path)))
        total += min(FRAME_BYTES, int(seconds * mel.frame_rate) * mel.num_mels * 2)
        if kind == "talker":  # the vocoder learns from the samples themselves
            total += int(seconds * mel.sample_rate) * 2
    return total


def rows_of(path: str) -> Sequence[Row]:
    """The usable rows of a manifest of recordings; none where there is no manifest."""
    return scan_speech_manifest(path, LENIENT).samples if Path(path).exists() else []


def seconds_of(row: Row) -> float:
    """How long a recording is; 0 where that cannot be told."""
    try:
        return recording_seconds(row.path("wav"))
    except UserError:
        return 0.0


def _file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.txt")) if path.is_dir() else path.stat().st_size


def _num_entries(path: str) -> int:
    return len(json.loads(Path(path).read_text(encoding="utf-8")))


def _features(values: dict[str, Any], paths: Sequence[str]) -> int:
    """Features of the distinct pictures and recordings of chats, fp16."""
    found: dict[str, dict[Path, None]] = {"image": {}, "audio": {}}
    for path in map(Path, paths):
        for line in path.read_text(encoding="utf-8").splitlines():
            for message in json.loads(line)["messages"]:
                for part in message["content"] if isinstance(message["content"], list) else []:
                    if part["type"] in found:
                        found[part["type"]][path.parent / part[part["type"]]] = None
    sounds = list(found["audio"])
    asked = sounds[:: max(1, len(sounds) // _ASKED)]
    seconds = sum(recording_seconds(path) for path in asked) / max(1, len(asked)) * len(sounds)
    seeing = _shape(VisionConfig, values["vision_ckpt"])
    hearing = _shape(AudioEncoderConfig, values["audio_ckpt"])
    states = seconds * hearing.mel.frame_rate / hearing.reduction
    return 2 * int(seeing.dim * seeing.num_patches * len(found["image"]) + hearing.dim * states)


def _shape(cls: type[Shape], checkpoint: str) -> Shape:
    """The shape of the encoder in a checkpoint; the usual one where it is not there yet."""
    return from_dict(cls, read_summary(checkpoint)["model_config"], checkpoint) if Path(checkpoint).exists() else cls()
