"""What a run will take, said before it begins, and when it turns out to be too much. Needs no torch.

The figures come from :mod:`omni.rehearsal`, which runs the stage in small in a process of its own; here they become a
plan, a batch size where the configuration says "auto", and what is said when memory runs out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omni.config import PhaseConfig, StageConfig, UserError, to_dict
from omni.console import log
from omni.plan_types import GIB, PhaseCost, PhasePlan, Plan, Request
from omni.plan_view import plan_text
from omni.stages import StageInfo, read_raw_config, stage_of_config, stage_of_script

Config = TypeVar("Config", bound=StageConfig)


# ---- making one ----


@dataclass(frozen=True)
class Wish:
    """What of a plan can be chosen: GPU memory in GiB, how many GPUs, how long to measure, and where."""

    memory: float = 12.0
    gpus: int = 1
    seconds: float = 10.0
    device: str = "auto"


def plan_config(path: Path, wish: Wish) -> Plan:
    """The plan of a configuration file.

    Raises:
        UserError: when it cannot be read or run.
    """
    values = read_raw_config(path)
    return make_plan(stage_of_config(path, values), values, str(path), path.parent, wish)


def make_plan(stage: StageInfo, values: dict[str, Any], where: str, configs: Path, wish: Wish) -> Plan:
    """Rehearse a configuration, given as plain values, and work out its plan; a batch "auto" is the largest that fits.

    Raises:
        UserError: what the rehearsal says when it fails.
    """
    automatic = [name for name, item in values.items() if isinstance(item, dict) and item.get("batch_size") == "auto"]
    known = {**values, **{name: {**values[name], "batch_size": 8} for name in automatic}}
    memory = round(wish.memory * GIB)
    costs, caches = _rehearse(Request(stage.script, known, where, str(configs), wish.device, wish.seconds))
    plan = Plan(values["name"], (), caches, memory, wish.gpus)
    phases = []
    for cost in costs:
        phase = PhasePlan(_phase(known[cost.name]), cost)
        if cost.name in automatic:
            best = max(1, plan.largest_batch(phase))
            scaled = dataclasses.replace(cost, seconds=cost.seconds * best / phase.config.batch_size)
            phase = PhasePlan(dataclasses.replace(phase.config, batch_size=best), scaled)
        phases.append(phase)
    return dataclasses.replace(plan, phases=tuple(phases))


def _phase(values: dict[str, Any]) -> PhaseConfig:
    names = {item.name for item in dataclasses.fields(PhaseConfig)}
    return PhaseConfig(**{key: value for key, value in values.items() if key in names})


def _rehearse(request: Request) -> tuple[list[PhaseCost], int | None]:
    with tempfile.TemporaryDirectory(prefix="omni-plan-") as name:
        path = Path(name) / "request.json"
        path.write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "omni.rehearsal", str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(_reason(request, done))
        found = json.loads(path.with_suffix(".found.json").read_text(encoding="utf-8"))
    return [PhaseCost.from_dict(item) for item in found["phases"]], found["caches"]


def _reason(request: Request, done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.strip().splitlines() if line]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    if said is not None:
        return said
    how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
    return f"{request.where}: its rehearsal {how}, perhaps for want of memory: {lines[-1] if lines else 'no message'}"


# ---- "auto" ----


def automatic_phases(config: StageConfig) -> list[str]:
    """The phases whose batch size is "auto"."""
    return [name for name, phase in _phases(config) if phase.batch_size == "auto"]


def _phases(config: StageConfig) -> Iterator[tuple[str, PhaseConfig]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, PhaseConfig):
            yield item.name, value


def settle_batch_sizes(
    config: Config, script: str, kind: str, room: int, num_ranks: int = 1, fresh: bool = False
) -> Config:
    """Put a number where a batch size is "auto": the one that the run has had so far, else the largest that fits.

    Args:
        config: the configuration.
        script: the stage's script.
        kind: "cuda" or "cpu": where it computes.
        room: bytes of memory there; on a CPU for the whole process.
        num_ranks: that share each batch, each with as much memory.
        fresh: whether an earlier run in the same folder is not to be gone on with.

    Raises:
        UserError: when not even one row fits.
    """
    names = automatic_phases(config)
    if not names:
        return config
    sizes = {} if fresh else _earlier_sizes(config, names)
    if sizes.keys() != set(names):
        stage = stage_of_script(script)
        assert stage is not None, "auto stands in configurations of the five stages alone"
        log.info("batch_size auto: looking for the largest batch that fits %.1f GiB", room / GIB)
        plan = make_plan(stage, to_dict(config), config.name, Path("configs"), Wish(seconds=0, device=kind))
        costs = {phase.cost.name: phase.cost for phase in plan.phases}
        sizes = {name: num_ranks * costs[name].largest_batch(kind, room, plan.caches or 0) for name in names}
    for name, size in sizes.items():
        if not size:
            raise UserError(f"{name}.batch_size: found auto, but not one sample fits the memory ({room / GIB:.1f} GiB)")
        log.info("%s.batch_size: auto is %d", name, size)
    phases: dict[str, Any] = {
        name: dataclasses.replace(phase, batch_size=sizes[name]) for name, phase in _phases(config) if name in sizes
    }
    return dataclasses.replace(config, **phases)


def _earlier_sizes(config: StageConfig, names: Sequence[str]) -> dict[str, int]:
    """The batch sizes that a run in the same folder has begun with."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((config.save_dir / "config.json").read_text(encoding="utf-8"))
        return {name: int(found[name]["batch_size"]) for name in names}
    return {}


# ---- out of memory ----

# what makes a sample smaller, by stage, or by phase where it differs
_SHORTER = {
    "thinker": "model.ctx_len", "audio_enc": "data.max_audio_seconds with --on_bad_sample skip",
    "vision": "data.num_negatives", "talker": "data.max_audio_seconds with --on_bad_sample skip", "omni": "ctx_len",
    "codec": "data.codec_frames", "vocoder": "data.vocoder_frames",
}  # fmt: skip


def out_of_memory(config: StageConfig, script: str, phase: str, kind: str, why: str, standing: str) -> UserError:
    """What to say when a phase does not fit: the plan, and the two settings that would help.

    Args:
        config: the configuration.
        script: the stage's script.
        phase: in which it happened.
        kind: "cuda" or "cpu": where it computes.
        why: what could not be had.
        standing: what there is to continue from.
    """
    settings = dict(_phases(config))[phase]
    stage = stage_of_script(script)
    table, shorter = "", "shorter samples"
    if stage is not None:
        shorter = f"a lower --{_SHORTER[phase if phase in _SHORTER else stage.kind]}"
        with contextlib.suppress(UserError):  # there may be too little memory for a rehearsal as well
            plan = make_plan(stage, to_dict(config), config.name, Path("configs"), Wish(seconds=0, device="cpu"))
            table = "\n" + plan_text(plan, (kind,))
    rows, half = settings.batch_size, settings.batch_size // 2
    if half:
        steps = -(-rows // half) * settings.gradient_accumulation_steps
        shorter = (
            f"--{phase}.batch_size {half} --{phase}.gradient_accumulation_steps {steps} (the same gradients in about "
            f"half the memory), or {shorter}"
        )
    return UserError(f"{phase}: out of memory with {rows} rows ({why}). What helps: {shorter}. {standing}{table}")
