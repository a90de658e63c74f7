"""What a run will take, said before it begins: memory by part, operations, time, the largest batch. Needs no torch.

The figures come from :mod:`omni.rehearsal`, which runs the stage in small in a process of its own; here they are
extrapolated to the batch that is configured, held against a device's memory, and shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omni.config import PhaseConfig, StageConfig, UserError, to_dict
from omni.console import log
from omni.stages import JUDGE, STAGES, StageInfo, read_raw_config

GIB = 2**30
# of a GPU's memory that tensors cannot have: the driver's context and kernels, and what lies between blocks
RESERVE = GIB
# Larger batches are not proposed: no device is busier with them, and what compares all samples with all others grows
# with the square of the batch, beyond what two small ones show.
MOST = 1024
Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Request:
    """What :mod:`omni.rehearsal` is asked.

    Attributes:
        script: the stage's script.
        values: the configuration as plain values, no batch size "auto".
        where: the configuration's file, for messages.
        configs: the folder with the configurations of earlier stages.
        device: where time is measured.
        seconds: to measure for, each phase; 0: no time.
        memory: bytes that may be used for it on a CPU.
        batch_sizes: on which memory is counted.
    """

    script: str
    values: dict[str, Any]
    where: str
    configs: str
    device: str = "auto"
    seconds: float = 0.0
    memory: int = 8 * GIB
    batch_sizes: tuple[int, ...] = (2, 4)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Request:
        """From what JSON gives back."""
        return cls(**{**values, "batch_sizes": tuple(values["batch_sizes"])})


@dataclass(frozen=True)
class Point:
    """Bytes of one step with so many rows, counted; and operations of one micro-batch.

    Attributes:
        batch_size: rows of a micro-batch.
        weights: of all modules that there are, trained or only used.
        gradients: of what is trained.
        optimizer: its state.
        activations: what the forward pass leaves for the backward pass.
        peak: the most that is alive at once, all of the above included.
        resident: the most that the process had, as the system counts.
        flops: floating-point operations of a micro-batch, forward and backward.
        trained: numbers that are trained.
    """

    batch_size: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    resident: int
    flops: float
    trained: int


@dataclass(frozen=True)
class PhaseCost:
    """What a phase takes with two small batches, by the kernels of a CPU and by CUDA's.

    Attributes:
        name: of the phase.
        cpu: points by the CPU's kernels.
        cuda: points by CUDA's: from a device where there is one, else counted on the CPU.
        program: bytes of a process on the CPU that are no tensors: program, libraries, their workspace.
        seconds: of a step, measured; 0: not.
        device: where.
    """

    name: str
    cpu: tuple[Point, ...]
    cuda: tuple[Point, ...]
    program: int
    seconds: float = 0.0
    device: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PhaseCost:
        """From what JSON gives back."""
        points = {key: tuple(Point(**item) for item in values[key]) for key in ("cpu", "cuda")}
        return cls(**{**values, **points})

    def at(self, kind: str, batch_size: int, key: str) -> float:
        """A figure of :class:`Point` at any batch size: it grows by as much for each row."""
        first, second = self.cpu if kind == "cpu" else self.cuda
        low, high = getattr(first, key), getattr(second, key)
        slope = (high - low) / (second.batch_size - first.batch_size)
        return float(low + max(0.0, slope) * (batch_size - first.batch_size))

    def peak(self, kind: str, batch_size: int) -> int:
        """Bytes of tensors at the most."""
        point = (self.cpu if kind == "cpu" else self.cuda)[0]
        return round(max(point.weights + point.gradients + point.optimizer, self.at(kind, batch_size, "peak")))

    def largest_batch(self, kind: str, room: int, caches: int = 0) -> int:
        """The most rows of a micro-batch that fit into ``room`` bytes, at most 1,024; 0 where not one does."""
        room -= self.program + caches if kind == "cpu" else RESERVE
        fitting = 0
        for step in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 1):
            while fitting + step <= MOST and self.peak(kind, fitting + step) <= room:
                fitting += step
        return fitting


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a plan."""

    config: PhaseConfig
    cost: PhaseCost

    def parts(self, kind: str, batch_size: int, gpus: int = 1) -> dict[str, int]:
        """Bytes by part; they add up to the peak."""
        cost, point = self.cost, (self.cost.cpu if kind == "cpu" else self.cost.cuda)[0]
        fixed = {"weights": point.weights, "gradients": point.gradients, "optimizer": point.optimizer}
        room = cost.peak(kind, batch_size) - sum(fixed.values())
        activations = min(room, round(cost.at(kind, batch_size, "activations")))
        parts = fixed | {"activations": activations, "workspace": room - activations}
        # before gradients are exchanged between ranks, they are copied into buckets
        return parts | ({"exchange": point.gradients} if gpus > 1 else {})

    def flops(self, kind: str = "cpu") -> float:
        """Floating-point operations of a step, all micro-batches."""
        return self.cost.at(kind, self.config.batch_size, "flops") * self.config.gradient_accumulation_steps


@dataclass(frozen=True)
class Plan:
    """What a configuration takes.

    Attributes:
        name: of the configuration.
        phases: in order.
        caches: bytes of data that a run keeps in the main memory; None where the data are not there yet.
        memory: bytes of the GPU that it is held against.
        gpus: ranks that share each batch.
    """

    name: str
    phases: tuple[PhasePlan, ...]
    caches: int | None
    memory: int
    gpus: int = 1

    def rows(self, phase: PhasePlan) -> int:
        """Rows of a micro-batch on one rank."""
        return -(-phase.config.batch_size // self.gpus)

    def peak(self, phase: PhasePlan, kind: str) -> int:
        """Bytes that a phase takes at the most: of tensors on CUDA; of the whole process on a CPU."""
        tensors = sum(phase.parts(kind, self.rows(phase), self.gpus).values())
        return tensors + (phase.cost.program + (self.caches or 0) if kind == "cpu" else 0)

    def fits(self, phase: PhasePlan) -> bool:
        """Whether it fits the GPU."""
        return self.peak(phase, "cuda") + RESERVE <= self.memory

    def largest_batch(self, phase: PhasePlan) -> int:
        """The most rows, of all ranks together, that fit the GPU."""
        exchange = phase.parts("cuda", 1, self.gpus)["exchange"] if self.gpus > 1 else 0
        return self.gpus * phase.cost.largest_batch("cuda", self.memory - exchange)

    def hours(self, phase: PhasePlan) -> float:
        """Of computing; of several GPUs what they would take if they never waited for each other."""
        return phase.cost.seconds * phase.config.max_steps / 3600 / self.gpus

    def values(self) -> dict[str, Any]:
        """As plain values, bytes and seconds."""
        return {"name": self.name, "memory": self.memory, "gpus": self.gpus, "caches": self.caches,
                "phases": {phase.cost.name: self._phase_values(phase) for phase in self.phases}}  # fmt: skip

    def _phase_values(self, phase: PhasePlan) -> dict[str, Any]:
        return {
            "batch_size": phase.config.batch_size,
            "gradient_accumulation_steps": phase.config.gradient_accumulation_steps,
            "max_steps": phase.config.max_steps,
            "trained_parameters": phase.cost.cpu[0].trained,
            "flops_per_step": phase.flops(),
            **{kind: phase.parts(kind, self.rows(phase), self.gpus) | {"peak": self.peak(phase, kind)}
               for kind in ("cuda", "cpu")},
            "program": phase.cost.program,
            "fits": self.fits(phase),
            "largest_batch": self.largest_batch(phase),
            "seconds_per_step": phase.cost.seconds or None,
            "device": phase.cost.device or None,
        }  # fmt: skip


# ---- making one ----


@dataclass(frozen=True)
class Wish:
    """What of a plan can be chosen: GPU memory in GiB, how many GPUs, how long to measure, and where."""

    memory: float = 12.0
    gpus: int = 1
    seconds: float = 10.0
    device: str = "auto"
    _: dict[str, Any] = field(default_factory=dict, repr=False)


def plan_config(path: Path, wish: Wish) -> Plan:
    """The plan of a configuration file.

    Raises:
        UserError: when it cannot be read or run.
    """
    values = read_raw_config(path)
    return make_plan(stage_of_values(path, values), values, str(path), path.parent, wish)


def stage_of_values(path: Path, values: dict[str, Any]) -> StageInfo:
    """The stage that a configuration is for, by its name (``<prefix>_<size>``) or by its file's.

    Raises:
        UserError: when neither says.
    """
    names = (values["name"], path.stem)
    for stage in (*STAGES, JUDGE):
        if any(name == stage.prefix or name.startswith(f"{stage.prefix}_") for name in names):
            return stage
    prefixes = ", ".join(f"{stage.prefix}_..." for stage in STAGES)
    raise UserError(f"{path}: name: found {values['name']!r}, expected a stage's: {prefixes}")


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
    return [name for name, phase in _phases(config) if phase.batch_size == "auto"]  # type: ignore[comparison-overlap]


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
        stage = next(stage for stage in (*STAGES, JUDGE) if stage.script == Path(script).name)
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
    """What to say when a phase does not fit: the plan, and the two settings that would help."""
    settings = dict(_phases(config))[phase]
    stage = next((stage for stage in (*STAGES, JUDGE) if stage.script == Path(script).name), None)
    rows, half = settings.batch_size, max(1, settings.batch_size // 2)
    text = table = ""
    if stage is not None:
        with contextlib.suppress(UserError):
            plan = make_plan(stage, to_dict(config), config.name, Path("configs"), Wish(seconds=0, device="cpu"))
            table = "\n" + plan_text(plan, (kind,))
    shorter = _SHORTER[phase if phase in _SHORTER else stage.kind] if stage is not None else "the length of a sample"
    if rows > 1:
        text = (
            f"--{phase}.batch_size {half} --{phase}.gradient_accumulation_steps "
            f"{-(-rows // half) * settings.gradient_accumulation_steps} (the same gradients in about half the memory), or "
        )
    return UserError(
        f"{phase}: out of memory with {rows} rows ({why}). Two settings help: {text}a lower --{shorter}. "
        f"{standing}{table}"
    )


# ---- showing it ----


def plan_text(plan: Plan, kinds: Sequence[str] = ("cuda", "cpu")) -> str:
    """A plan as a table for a terminal."""
    lines = [plan.name + (f", {plan.gpus} GPUs" if plan.gpus > 1 else "")]
    for phase in plan.phases:
        lines += [f"  {line}" for line in _phase_lines(plan, phase, kinds)]
    if "cpu" in kinds:
        caches = "unknown, the data are not there" if plan.caches is None else size_text(plan.caches)
        lines.append(f"  data kept in the main memory: {caches}")
    return "\n".join(lines)


def _phase_lines(plan: Plan, phase: PhasePlan, kinds: Sequence[str]) -> Iterator[str]:
    config, cost = phase.config, phase.cost
    rows = f"{config.gradient_accumulation_steps} x {config.batch_size}"
    yield (
        f"phase {cost.name}: {cost.cpu[0].trained / 1e6:.2f} M trained parameters, {config.max_steps} steps of {rows}, "
        f"{phase.flops() / 1e12:.3g} TFLOP a step"
    )
    for kind in kinds:
        parts = phase.parts(kind, plan.rows(phase), plan.gpus)
        if kind == "cpu":
            parts = parts | {"program": cost.program} | ({"data": plan.caches} if plan.caches else {})
        shown = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
        yield f"  {'CUDA' if kind == 'cuda' else 'CPU '} {size_text(plan.peak(phase, kind)):>9} at the most: {shown}"
    if "cuda" in kinds:
        fits = "yes" if plan.fits(phase) else "NO"
        best = plan.largest_batch(phase)
        most = f"{best} or more" if best >= MOST * plan.gpus else str(best)
        yield f"  fits {plan.memory / GIB:g} GB: {fits}; largest batch that fits: {most}"
    if cost.seconds:
        best_case = f", on {plan.gpus} such devices if none ever waits" if plan.gpus > 1 else ""
        yield (
            f"  {cost.seconds:.3g} s a step on {cost.device}: {plan.hours(phase):.3g} hours of computing{best_case}, "
            f"{phase.flops() / cost.seconds / 1e12:.3g} TFLOP/s"
        )


def size_text(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GB" if size >= GIB else f"{size / 2**20:.0f} MB"
