"""The weights of a checkpoint, module by module: norms, dead units, dead codes, what is not finite, what has changed.

The file is verified by its checksum and loaded with ``weights_only=True``; no code from it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from omni.checkpoint import load_checkpoint
from omni.config import UserError
from omni.inspection.facts import CheckpointFile, count
from omni.inspection.plain import without_nan
from omni.inspection.runs import Inspection, RunRecord
from omni.inspection.text import aligned, printable

# A unit is dead when the norm of its row is this small beside its matrix's median row: a chosen threshold, 40 dB down.
DEAD_UNIT = 0.01


@dataclass(frozen=True)
class ModuleHealth:
    """One module.

    Attributes:
        name: the first part of its weights' names, up to a layer's number.
        num_parameters: numbers in it, buffers included.
        norm: of all of them as one vector, over what is finite.
        largest: absolute value.
        num_units: rows of its matrices and kernels.
        num_dead: those among them that hardly have a weight.
        num_not_finite: NaN and Inf.
        moved: distance from the checkpoint before, over that one's norm; None without one.
    """

    name: str
    num_parameters: int
    norm: float
    largest: float
    num_units: int
    num_dead: int
    num_not_finite: int
    moved: float | None


@dataclass(frozen=True)
class CodebookHealth:
    """One codebook of a quantizer.

    Attributes:
        name: of the quantizer, and the codebook's number from 1 on.
        size: codes.
        dead: share of codes with less than ``revive_below`` of an even load, as training has it.
        perplexity: of the moving average of the loads: how many codes are used in effect.
    """

    name: str
    size: int
    dead: float
    perplexity: float


@dataclass(frozen=True)
class Health:
    """A checkpoint's weights; ``before`` names the checkpoint that they are compared with."""

    checkpoint: CheckpointFile
    before: CheckpointFile | None
    modules: list[ModuleHealth]
    codebooks: list[CodebookHealth]
    num_not_finite_in_optimizer: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "checkpoint": str(self.checkpoint.path),
            "before": str(self.before.path) if self.before else None,
            "modules": [asdict(item) for item in self.modules],
            "codebooks": [asdict(item) for item in self.codebooks],
            "not_finite_in_optimizer": self.num_not_finite_in_optimizer,
        }


def weight_health(run: RunRecord) -> Health | None:
    """The health of the checkpoint that a run shows, beside the one before it in the same folder.

    Raises:
        UserError: when the file is damaged, or holds anything but weights.
    """
    shown = run.shown
    if shown is None:
        return None
    tensors, _ = load_checkpoint(shown.path)
    weights = _weights(tensors, shown)
    before, old = _before(run, shown), {}
    if before is not None:
        try:
            old = _weights(load_checkpoint(before.path)[0], before)
        except UserError:  # pruned meanwhile, or damaged: then there is nothing to compare with
            before = None
    groups: dict[str, list[str]] = {}
    for key in weights:
        groups.setdefault(module_of(key), []).append(key)
    modules = [_module(name, keys, weights, old) for name, keys in groups.items()]
    training = tensors.get("training")
    state = training.get("optimizer") if isinstance(training, dict) else None
    broken = sum(_not_finite(item) for item in _tensors(state))
    return Health(shown, before, modules, list(_codebooks(weights, shown.facts.model_config)), broken)


def folder_health(found: Inspection) -> tuple[str, list[dict[str, Any]], bool]:
    """The health of every run in an inspection: as text, as plain values, and whether all of them could be read."""
    texts, values, whole = [], [], True
    for run in found.runs:
        try:
            health = weight_health(run)
        except UserError as error:
            texts.append(f"weights of {error}")
            values.append({"checkpoint": str(run.shown.path) if run.shown else None, "problem": str(error)})
            whole = False
            continue
        if health is not None:
            texts.append(health_text(health))
            values.append(health.to_dict())
    return printable("\n\n".join(texts)), [dict(without_nan(item)) for item in values], whole


def _weights(tensors: Any, checkpoint: CheckpointFile) -> dict[str, torch.Tensor]:
    found = tensors.get("weights") if isinstance(tensors, dict) else None
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in found.items()
    ):
        raise UserError(f"{checkpoint.path}: found no weights in it, expected tensors by name")
    return found


def _before(run: RunRecord, shown: CheckpointFile) -> CheckpointFile | None:
    """The newest checkpoint of the same kind that was written at an earlier step."""
    earlier = [item for item in run.checkpoints
               if item.facts.kind == shown.facts.kind and item.facts.total_step < shown.facts.total_step]  # fmt: skip
    return max(earlier, key=lambda item: item.facts.total_step, default=None)


def module_of(key: str) -> str:
    """``layers.3.attention.query.weight`` belongs to ``layers.3``, ``codec.decoder.weight`` to ``codec.decoder``."""
    parts = key.split(".")[:-1] or [key]
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:2])


def _module(name: str, keys: list[str], weights: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> ModuleHealth:
    square = largest = moved = base = 0.0
    num_units = num_dead = broken = 0
    comparable = bool(old)
    for key in keys:
        tensor = weights[key]
        broken += _not_finite(tensor)
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        finite = torch.nan_to_num(tensor.double(), 0.0, 0.0, 0.0)
        square += float(finite.square().sum())
        largest = max(largest, float(finite.abs().max()))
        if tensor.ndim >= 2 and tensor.shape[0] > 1 and not key.endswith(("_KV", "_KVD")):  # codes are not units
            rows = finite.flatten(1).norm(dim=1)
            num_units += len(rows)
            num_dead += int((rows <= DEAD_UNIT * rows.median()).sum())
        before = old.get(key)
        if before is None or before.shape != tensor.shape:
            comparable = False
        else:
            earlier = torch.nan_to_num(before.double(), 0.0, 0.0, 0.0)
            moved, base = moved + float((finite - earlier).square().sum()), base + float(earlier.square().sum())
    distance = math.sqrt(moved / base) if comparable and base else None
    numbers = sum(weights[key].numel() for key in keys)
    return ModuleHealth(name, numbers, math.sqrt(square), largest, num_units, num_dead, broken, distance)


def _not_finite(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _codebooks(weights: dict[str, torch.Tensor], model_config: dict[str, Any]) -> Iterator[CodebookHealth]:
    """Every codebook of every residual quantizer, by the loads that it keeps (models/quantizer.py)."""
    for key, load_KV in weights.items():
        prefix, _, name = key.rpartition(".")
        if name != "load_KV" or load_KV.ndim != 2:
            continue
        threshold = next(_values(model_config, "revive_below"), 0.0)
        for index, load_V in enumerate(load_KV.double()):
            share_V = load_V.clamp(min=0) / load_V.clamp(min=0).sum().clamp(min=1e-12)
            entropy = -(share_V * share_V.clamp(min=1e-12).log()).sum()
            dead = float((share_V * len(share_V) < threshold).double().mean())
            yield CodebookHealth(f"{prefix} {index + 1}", len(share_V), dead, float(entropy.exp()))


def _values(values: dict[str, Any], name: str) -> Iterator[float]:
    for key, item in values.items():
        if key == name and isinstance(item, int | float):
            yield float(item)
        elif isinstance(item, dict):
            yield from _values(item, name)


def health_text(health: Health) -> str:
    """Health as lines."""
    shown = health.checkpoint
    lines = [f"weights of {shown.path}: every byte as it was written, loaded without running code"]
    earlier = health.before
    if earlier:
        lines.append(f"moved: distance from {earlier.path.name} ({earlier.facts.total_step:,} steps), over its norm")
    rows = [("module", "parameters", "norm", "largest", "dead units", "not finite", "moved")]
    for item in health.modules:
        dead = f"{item.num_dead:,} of {item.num_units:,}" if item.num_units else "-"
        moved = "-" if item.moved is None else f"{item.moved:.4f}"
        rows.append((item.name, count(item.num_parameters), f"{item.norm:.4g}", f"{item.largest:.4g}", dead,
                     f"{item.num_not_finite:,}", moved))  # fmt: skip
    lines += aligned(rows)
    if health.codebooks:
        lines.append("codebooks, by the moving average of what they quantized")
        lines += aligned([("codebook", "codes", "dead", "perplexity"), *(
            (item.name, f"{item.size:,}", f"{100 * item.dead:.1f} %", f"{item.perplexity:.1f}")
            for item in health.codebooks
        )])  # fmt: skip
    broken = sum(item.num_not_finite for item in health.modules) + health.num_not_finite_in_optimizer
    inside = health.num_not_finite_in_optimizer
    where = f", {inside:,} of them in the optimizer" if inside else ""
    lines.append(f"not finite: {f'{broken:,} numbers{where}' if broken else 'nothing'}")
    return "\n".join(lines)
