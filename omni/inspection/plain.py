"""What `omni inspect` found, as plain values for ``--json``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from omni.curves import loss_curve, phases_of
from omni.inspection.ancestry import Ancestor, ancestry
from omni.inspection.facts import CheckpointFile, amounts
from omni.inspection.runs import Inspection, Problem, RunRecord, skipped, validations
from omni.inspection.text import resume_text


def inspection_values(found: Inspection) -> dict[str, Any]:
    """An :class:`Inspection` as one object that JSON can hold: NaN and Inf are null."""
    alone = found.what == "checkpoint"
    values = {
        "path": str(found.path),
        "what": found.what,
        "runs": [_run(run, alone) for run in found.runs],
        "problems": _problems(found.problems),
    }
    return dict(without_nan(values))


def without_nan(value: Any) -> Any:
    """Plain values with null for what JSON does not know."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(run: RunRecord, alone: bool) -> dict[str, Any]:
    shown = run.shown
    stage = shown.stage if shown else None
    return {
        "folder": str(run.folder),
        "name": shown.name if shown else None,
        "stage": stage.letter if stage else None,
        "state": run.state,
        "holder": run.holder or None,
        "resume": resume_text(run, alone),
        "checkpoint": _checkpoint(shown, whole=True) if shown else None,
        "checkpoints": [_checkpoint(item, whole=False) for item in run.checkpoints],
        "problems": _problems(run.problems),
        "shipped": str(run.shipped) if run.shipped else None,
        "differences": [
            {"key": key, "shipped": None if there is ... else there, "default": there is ..., "here": here}
            for key, there, here in run.differences()
        ],
        "validation": [dataclasses.asdict(item) for item in validations(run)],
        "skipped": skipped(run),
        "lineage": _ancestor(ancestry(shown)) if shown else None,
        "curves": {
            phase: {event: _curve(run, phase, event) for event in ("train", "val")} for phase in phases_of(run.metrics)
        },
    }


def _curve(run: RunRecord, phase: str, event: str) -> list[tuple[int, float]]:
    found = loss_curve(run.metrics, phase, event)
    return list(zip(found.steps, found.values, strict=True))


def _checkpoint(item: CheckpointFile, whole: bool) -> dict[str, Any]:
    facts = dataclasses.asdict(item.facts)
    values = {"path": str(item.path), "bytes": item.num_bytes, "role": item.role}
    if whole:
        return {**values, **facts, "amounts": amounts(item.facts)}
    return {**values, **{key: facts[key] for key in ("phase", "step", "total_step", "resumable", "sha256", "figures")}}


def _problems(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"path": str(problem.path), "problem": problem.text} for problem in problems]


def _ancestor(node: Ancestor) -> dict[str, Any]:
    return {
        "kind": node.kind,
        "path": str(node.path) if node.path else None,
        "sha256": node.sha256,
        "state": node.state or None,
        "now": node.now or None,
        "data": dict(node.data),
        "inputs": [_ancestor(item) for item in node.inputs],
    }
