"""`omni data check`: read every manifest that configurations name and list all problems, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omni.config import UserError
from omni.stages import STAGES, StageInfo, read_raw_config


def check_configs(paths: Sequence[Path]) -> list[str]:
    """One line for each problem, as ``file:line: what``; empty when everything can be read."""
    problems: list[str] = []
    for path in paths:
        try:
            values = read_raw_config(path)
            stage = _stage_of(path, values)
            data = values["data"] if isinstance(values.get("data"), dict) else {}
            manifests = [str(data[key]) for key in _keys(stage) if data.get(key)]
            if not manifests:
                problems.append(f"{path}: data: names no {' or '.join(_keys(stage)[:1])}, expected a manifest")
            for manifest in dict.fromkeys(manifests):
                problems += check_manifest(stage.kind, manifest)
        except UserError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def check_manifest(kind: str, manifest: str) -> list[str]:
    """The problems of one manifest of a stage."""
    try:
        _READERS[kind](manifest)
    except UserError as error:
        return str(error).splitlines()
    return []


def _stage_of(path: Path, values: dict[str, Any]) -> StageInfo:
    """The stage a configuration belongs to, by its name, which begins with the stage's."""
    for stage in STAGES:
        if values["name"].startswith(stage.prefix) or path.stem.startswith(stage.prefix):
            return stage
    prefixes = ", ".join(stage.prefix for stage in STAGES)
    raise UserError(f"{path}: name: found {values['name']!r}, expected one that begins with a stage's: {prefixes}")


def _keys(stage: StageInfo) -> tuple[str, ...]:
    return (
        "train",
        "val",
        *("test", "test_voices", "test_words", "test_combinations", "replay_text", "speech_train", "speech_val"),
    )


def _read_text(path: str) -> object:
    from omni.data.text import read_text

    return read_text(path)


def _read_speech(path: str) -> object:
    from omni.data.speech import read_speech_manifest, recording_seconds

    rows, problems = read_speech_manifest(path), []
    for row in rows:
        try:
            recording_seconds(row.path("wav"))
        except UserError as error:
            problems.append(f"{row.where}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return rows


def _read_images(path: str) -> object:
    from omni.data.images import read_image_manifest

    return read_image_manifest(path)


def _read_chats(path: str) -> object:
    from omni.data.dialogue import read_chats

    if path.endswith(".csv"):
        return _read_speech(path)
    return read_chats(path) if path.endswith(".jsonl") else _read_text(path)


_READERS: dict[str, Callable[[str], object]] = {
    "thinker": _read_text,
    "audio_enc": _read_speech,
    "vision": _read_images,
    "talker": _read_speech,
    "omni": _read_chats,
}
