"""What a run takes: counted on two small batches (:mod:`omni.rehearsal`), worked out for any other. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni.config import PhaseConfig

GIB = 2**30
# of a GPU's memory that tensors cannot have: the driver's context and kernels, and what lies between blocks
RESERVE = GIB
# Larger batches are not proposed: no device is busier with them, and what compares all samples with all others grows
# with the square of the batch, beyond what two small ones show.
MOST = 1024


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
        heap: bytes by which a process on the CPU grows for each byte of tensors: what kernels take inside of an
            operation and what lies between blocks of the heap included.
        seconds: of a step, measured; 0: not.
        device: where.
    """

    name: str
    cpu: tuple[Point, ...]
    cuda: tuple[Point, ...]
    program: int
    heap: float = 1.0
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
        """Bytes at the most: of tensors, on the CPU of what they make the process grow by."""
        point = (self.cpu if kind == "cpu" else self.cuda)[0]
        tensors = max(point.weights + point.gradients + point.optimizer, self.at(kind, batch_size, "peak"))
        return round(tensors * (self.heap if kind == "cpu" else 1))

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
