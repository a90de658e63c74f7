"""What one checkpoint file says of itself, checked, so that a foreign or hostile file is a sentence and not an end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni.command_line import differing_keys
from omni.config import UserError, from_dict
from omni.files import file_problem
from omni.stages import JUDGE, STAGES, StageInfo
from omni.summary import read_summary

_LARGEST = 10**18  # of what is counted; beyond it, numbers are damage


@dataclass(frozen=True)
class Facts:
    """The summary inside of a checkpoint; see ``Loop._summary`` and ``SaveFolder.save``, which write it."""

    kind: str
    sha256: str
    phase: str
    phases: tuple[str, ...]
    step: int
    max_steps: int
    total_step: int
    resumable: bool
    skipped: int
    seen: dict[str, int]
    seconds: float
    parameters: dict[str, int]
    precision: str
    figures: dict[str, dict[str, float]]
    config: dict
    model_config: dict
    lineage: dict
    code: dict
    changed: tuple[str, ...] | None = None  # keys that are not at their default; older checkpoints do not say


@dataclass(frozen=True)
class CheckpointFile:
    """A file and what it says."""

    path: Path
    num_bytes: int
    written: float  # seconds since 1970
    facts: Facts

    @property
    def role(self) -> str:
        """What its name says: final, best, periodic or other."""
        kind, stem = self.facts.kind, self.path.stem
        if stem.startswith(f"{kind}_step_"):
            return "periodic"
        return {kind: "final", f"{kind}_best": "best"}.get(stem, "other")

    @property
    def name(self) -> str:
        """Of its configuration."""
        return str(self.facts.config["name"])

    @property
    def stage(self) -> StageInfo | None:
        """The stage that makes such a checkpoint; None for a kind of somebody's own."""
        if self.facts.kind == JUDGE.kind and self.name.startswith(f"{JUDGE.prefix}_"):
            return JUDGE
        return next((stage for stage in STAGES if stage.kind == self.facts.kind), None)


def read_checkpoint(path: Path) -> CheckpointFile:
    """What a checkpoint says of itself, without its tensors.

    Raises:
        UserError: in one line, when it is not a whole checkpoint of this project, or is gone.
    """
    if problem := file_problem(path):
        raise UserError(f"{path}: {problem}, expected a checkpoint")
    summary = read_summary(path)
    known = {key: value for key, value in summary.items() if key in Facts.__dataclass_fields__}
    try:
        facts = from_dict(Facts, known, "its summary")
    except (UserError, OverflowError) as error:
        first, *more = str(error).split("\n")
        raise UserError(f"{path}: {first}" + (f" and {len(more)} more" if more else "")) from None
    numbers = [facts.step, facts.max_steps, facts.total_step, facts.skipped]
    if max(map(abs, [*numbers, *facts.seen.values(), *facts.parameters.values()])) > _LARGEST:
        raise UserError(f"{path}: its summary: found a number of more than {_LARGEST:,}, expected counts")
    if not isinstance(facts.config.get("name"), str):
        raise UserError(f"{path}: its summary: config.name: found none, expected the configuration's name")
    if facts.phase not in facts.phases:
        raise UserError(f"{path}: its summary: phase: found {facts.phase!r}, expected one of phases")
    found = path.stat()
    return CheckpointFile(path, found.st_size, found.st_mtime, facts)


# ---- as people say it ----


def amounts(facts: Facts) -> list[str]:
    """What training has seen, by phase: tokens, hours of audio, images."""
    shown = []
    for key, count in facts.seen.items():
        phase, _, unit = key.partition(".")
        seconds = _seconds_of_audio(facts, phase, unit)
        text = f"{count:,} {unit}" if seconds is None else f"{hours(seconds * count)} of audio ({count:,} {unit})"
        shown.append(f"{phase}: {text}" if len(facts.seen) > 1 else text)
    return shown


def _seconds_of_audio(facts: Facts, phase: str, unit: str) -> float | None:
    """Seconds of sound behind one of what a phase counts; None where it counts no sound."""
    mel = facts.model_config.get("mel")
    try:
        frame = mel["hop_length"] / mel["sample_rate"] if isinstance(mel, dict) else None
        if frame is None or unit != "frames":
            return None
        # the Talker counts frames of codes, all others frames of the spectrogram
        return float(frame * (facts.model_config["codec"]["reduction"] if phase == "talker" else 1))
    except (KeyError, TypeError, ZeroDivisionError, OverflowError):
        return None


def hours(seconds: float) -> str:
    """A duration as people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"


def size(num_bytes: int) -> str:
    """Bytes as people read them."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.2f} GiB"


def count(number: int) -> str:
    """A number of parameters as people read it."""
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number:,}"


def value(number: Any) -> str:
    """A figure as people read it."""
    return f"{number:.4g}" if isinstance(number, int | float) else "-"


def config_differences(facts: Facts, shipped: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """``(key, shipped, here)`` of every key of a run's configuration that differs from a configuration file.

    A key that the file does not name stands at its default there; ``...`` stands for a default that differs.
    """
    return differing_keys(facts.config, shipped, facts.changed or ())
