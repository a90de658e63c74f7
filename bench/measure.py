"""One stage's training on this machine: the loop as it is, the same steps without it, what waits, what is padding."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni.boards import Boards
from omni.config import PhaseConfig
from omni.plan_types import PhaseCost, Request
from omni.rehearsal import Rehearsal, count, rehearsal
from omni.runtime import Precision
from omni.stages import read_raw_config, stage_of_config
from omni.stand_ins import Wanted
from omni.step_cost import flop_counter
from omni.tokenizer import IGNORE
from omni.tracking import Progress

WARM_UP = 3  # steps before anything is timed


def request_of(path: Path, compiled: bool = False) -> Request:
    """A configuration file as a rehearsal takes it, its blocks compiled if so wanted."""
    values = read_raw_config(path)
    if compiled:
        values["run"] = values.get("run", {}) | {"compile": True}
    return Request(stage_of_config(path, values).script, values, str(path), str(path.parent))


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(precision: Precision, seconds: float = 1.0) -> float:
    """Operations a second of a large matrix product in the precision of training: what this device can do."""
    size = 8192 if precision.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=precision.device, dtype=precision.dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + seconds
    for _ in range(WARM_UP):
        a @ b
    while best == float("inf") or time.perf_counter() < deadline:
        wait_for(precision.device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        wait_for(precision.device)
        best = min(best, (time.perf_counter() - started) / 4)
    return 2 * size**3 / best


def padding(batch: Any) -> tuple[int, int]:
    """Positions of a batch that are padding, and all of them; 0 and 0 for batches that never have any."""
    if hasattr(batch, "valid_BT"):
        return int((~batch.valid_BT).sum()), batch.valid_BT.numel()
    if hasattr(batch, "answers_BT"):
        return int((batch.labels_BT == IGNORE).sum()), batch.labels_BT.numel()
    if hasattr(batch, "caption_words"):
        computed = len(batch.words.places_N) + len(batch.caption_words.places_N)
        return computed - int(batch.valid_NT.sum()) - int(batch.valid_NT[: len(batch.pixels_B3HW)].sum()), computed
    if hasattr(batch, "num_frames_B"):
        rows, longest = (batch.codes_BTK if hasattr(batch, "codes_BTK") else batch.frames_BFM).shape[:2]
        return rows * longest - int(batch.num_frames_B.sum()), rows * longest
    return 0, 0


class Timed(Rehearsal):
    """The loop, and beside it the bare steps that it is made of."""

    def begin(self, name: str) -> None:
        """Prepare what the loop's own step needs."""
        self.name, self.waiting = name, 0.0
        self.progress = Progress(name, 0, self.stage.config.max_steps)
        self.boards = Boards()
        self.kept: list[Any] = []

    def _fetch(self) -> Any:
        started = time.perf_counter()
        batches, rows = super()._fetch()
        self.waiting, self.kept = time.perf_counter() - started, batches
        return batches, rows

    def looped(self) -> float:
        """Seconds of a step of the loop."""
        started = time.perf_counter()
        self._step(self.name, self._set_lr)
        wait_for(self.precision.device)
        return time.perf_counter() - started

    def bare(self) -> float:
        """Seconds of the same step on the same batches in plain PyTorch: no guards, no counts, no schedule.

        What belongs to the method (a codebook's moving averages) is done here as well.
        """
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        for batch in self.kept:
            with self.precision.autocast():
                terms = self.stage.compute_loss(self.run.model, batch.to(self.precision.device))
            loss = sum(self.stage.weights[term] * total / max(1, batch.counts[term]) for term, total in terms.items())
            assert isinstance(loss, torch.Tensor)
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.optimizer.step()
        if self.stage.after_update is not None:
            self.stage.after_update()
        wait_for(self.precision.device)
        return time.perf_counter() - started

    def operations(self) -> int:
        """Of a step on the same batches, counted."""
        with flop_counter() as counted:
            self.bare()
        return int(counted.get_total_flops())


@contextlib.contextmanager
def timed_loop(request: Request, precision: Precision, num: int, **changes: Any) -> Iterator[Timed]:
    """A stage on ``num`` samples, to be timed: it neither ends nor validates nor saves; ``changes`` to its phases."""
    with rehearsal(
        request, precision, lambda phase: dataclasses.replace(phase, max_steps=10**6, **changes),
        Wanted(num, longest=False), Timed,
    ) as loop:  # fmt: skip
        assert isinstance(loop, Timed)
        loop.options = dataclasses.replace(loop.options, val_freq=10**9, checkpoint_freq=10**9)
        yield loop


def measure_stage(
    path: Path, precision: Precision, seconds: float, peak: float, num: int = 0, compiled: bool = False
) -> list[dict[str, Any]]:
    """Every phase of a configuration, for so many seconds each.

    Args:
        path: the configuration.
        precision: how and where it computes.
        seconds: a phase.
        peak: of a matrix product, operations a second.
        num: samples; 0: enough to sort by length as a run does (:mod:`omni.data.stream`), but at most 4,000.
        compiled: whether its blocks learn through ``torch.compile``.
    """
    request = request_of(path, compiled)
    most, found = largest_batch(request), []
    with timed_loop(request, precision, num or max(2 * most, min(4000, 50 * most))) as loop:
        for name in loop.phases():
            loop.begin(name)
            found.append({"config": path.stem, "phase": name} | _measure_phase(loop, seconds, peak))
            loop.progress.close()
    return found


def largest_batch(request: Request) -> int:
    """The most samples that one of its phases takes at a time."""
    return max(
        part["batch_size"] for part in request.values.values() if isinstance(part, dict) and "batch_size" in part
    )


def _measure_phase(loop: Timed, seconds: float, peak: float) -> dict[str, Any]:
    device, unit = loop.precision.device, loop.stage.unit
    for _ in range(WARM_UP):
        loop.looped()
        loop.bare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    looped, bare, waiting, targets, padded, positions = [], [], [], 0, 0, 0
    while sum(looped) + sum(bare) < seconds or len(looped) < 5:
        looped.append(loop.looped())
        waiting.append(loop.waiting)
        bare.append(loop.bare())  # in turn, so that a slow moment hits both
        for batch in loop.kept:
            targets += batch.counts[unit]
            wasted, total = padding(batch)
            padded, positions = padded + wasted, positions + total
    # batches differ in length: each one's operations over its own time
    timed = [(loop.looped(), loop.operations()) for _ in range(5)]
    step = statistics.median(looped)
    computing = [whole - wait for whole, wait in zip(looped, waiting, strict=True)]
    overhead = statistics.median(long / short - 1 for long, short in zip(computing, bare, strict=True))
    config = loop.stage.config
    return {
        "batch": f"{config.gradient_accumulation_steps} x {config.batch_size}",
        "precision": loop.precision.name,
        "steps": len(looped),
        "seconds_per_step": step,
        "throughput": targets / sum(looped),
        "unit": unit,
        "waiting": sum(waiting) / sum(looped),
        "overhead": overhead,
        "flops_per_step": round(statistics.mean(count for _, count in timed)),
        "mfu": statistics.median(count / seconds for seconds, count in timed) / peak,
        "padding": padded / positions if positions else 0.0,
        "peak_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }  # fmt: skip


def foretold(path: Path, precision: Precision) -> list[dict[str, Any]]:
    """Peak memory of every phase as a plan foretells it, and as it is with the whole batch; on CUDA."""
    request = request_of(path)
    counted = [count(request, precision, "cuda", size) for size in request.batch_sizes]

    def change(phase: PhaseConfig) -> PhaseConfig:
        steps = min(2, phase.gradient_accumulation_steps)
        return dataclasses.replace(phase, gradient_accumulation_steps=steps, max_steps=10)

    found, device = [], precision.device
    with rehearsal(request, precision, change, Wanted(2 * largest_batch(request), longest=True)) as loop:
        for name in loop.phases():
            points = tuple(item[name] for item in counted)
            cost = PhaseCost(name, points, points, 0)
            gc.collect()
            loop.step()
            torch.cuda.reset_peak_memory_stats(device)
            loop.step()
            expected, measured = (
                cost.peak("cuda", loop.stage.config.batch_size),
                torch.cuda.max_memory_allocated(device),
            )
            entry = {"config": path.stem, "phase": name, "foretold": expected, "measured": measured}
            found.append(entry | {"error": expected / measured - 1, "reserved": torch.cuda.max_memory_reserved(device)})
    return found
