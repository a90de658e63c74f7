"""A stage run in small through its own script and loop, to see what a step of it takes.

``python -m omni.rehearsal REQUEST.json`` is a process of its own, started by :mod:`omni.planning`: what it takes itself
can then be told from what the step takes, and nothing of it stays.

**Memory** is counted, not computed from formulas: the true step (:meth:`omni.training_utils.Loop._update`) runs on two
small batches, and every tensor that it makes is counted while it lives (:class:`omni.step_cost.LiveBytes`). Tensors
grow in proportion to the batch, so two points say what any batch takes. On CUDA the allocator is asked instead, which
knows the kernels' workspace as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import resource
import statistics
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from omni.config import PhaseConfig, StageConfig, from_dict, to_dict
from omni.console import user_errors
from omni.data_memory import data_memory
from omni.models.layers import kernels_of
from omni.plan_types import MOST, PhaseCost, Point, Request
from omni.processes import die_with_parent
from omni.runtime import Precision, seed_everything, setup_compute
from omni.stages import StageInfo, stage_of_script
from omni.stand_ins import Wanted, stand_in
from omni.step_cost import LiveBytes, flop_counter
from omni.training_utils import Loop, Run

_SEEN = 2**29  # bytes of tensors that make a process grow by more than the libraries' own memory varies
_ROOT = Path(__file__).parent.parent  # the stage scripts stand beside the package


def load_script(name: str) -> types.ModuleType:
    """A stage's script as a module."""
    path = Path(name) if Path(name).exists() else _ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def config_class(script: types.ModuleType) -> type[StageConfig]:
    """The configuration that a stage's ``build`` takes."""
    found: type[StageConfig] = typing.get_type_hints(script.build)["config"]
    return found


class Rehearsal(Loop):
    """The training loop without its evening: phases are built and steps are done, nothing is validated or saved."""

    def phases(self) -> Iterator[str]:
        """Each phase in turn, ready for its steps."""
        for name, build in self.run.phases:
            self._set_lr = self._begin_phase(name, build)
            yield name
            self.stage.stream.close()
            self.state.next_phase()

    def step(self) -> None:
        """Fetch and update as :meth:`omni.training_utils.Loop._step` does."""
        self._set_lr(self.state.step)
        self._update(self._fetch()[0])
        self.state.step += 1


@contextlib.contextmanager
def rehearsal(
    request: Request,
    precision: Precision,
    change: Callable[[PhaseConfig], PhaseConfig],
    wanted: Wanted,
    kind: type[Rehearsal] = Rehearsal,
) -> Iterator[Rehearsal]:
    """A stage on stand-ins, each of its phases changed.

    Args:
        request: which stage and configuration.
        precision: how and where it computes.
        change: from each phase's configuration to that of the rehearsal.
        wanted: which samples.
        kind: of the loop.
    """
    script = load_script(request.script)
    config = from_dict(config_class(script), request.values, request.where)
    with tempfile.TemporaryDirectory(prefix="omni-plan-") as name:
        values = stand_in(_stage(request), to_dict(config), Path(request.configs), Path(name), wanted)
        config = from_dict(config_class(script), values, request.where)
        changed: dict[str, Any] = {
            item.name: change(found)
            for item in dataclasses.fields(config)
            if isinstance(found := getattr(config, item.name), PhaseConfig)
        }
        config = dataclasses.replace(config, **changed)
        seed_everything(config.run.seed)
        run: Run = script.build(config, precision)
        run.model.to(precision.device)
        yield kind(run, config, precision)
    gc.collect()


def _stage(request: Request) -> StageInfo:
    stage = stage_of_script(request.script)
    assert stage is not None, f"{request.script} is none of the five scripts"
    return stage


# ---- memory ----


def count(request: Request, precision: Precision, kernels: str, batch_size: int) -> dict[str, Point]:
    """What a step of each phase takes with ``batch_size`` rows of the longest samples, by the kernels of a device."""

    def change(phase: PhaseConfig) -> PhaseConfig:
        # with a second micro-batch, gradients are there while it is computed
        steps = min(2, phase.gradient_accumulation_steps)
        return dataclasses.replace(phase, batch_size=batch_size, gradient_accumulation_steps=steps, max_steps=10)

    found = {}
    as_cuda = kernels == "cuda" and precision.device.type == "cpu"
    with contextlib.ExitStack() as stack:
        if as_cuda:
            stack.enter_context(kernels_of("cuda"))
            if precision.dtype != torch.float32:
                stack.enter_context(_CudaAutocast())
        small = stack.enter_context(rehearsal(request, precision, change, Wanted(2 * batch_size, longest=True)))
        for name in small.phases():
            found[name] = _count_phase(small)
    return found


def _count_phase(small: Rehearsal) -> Point:
    """The second step of a phase; the first one makes the optimizer's state."""
    device, loss = small.precision.device, small.stage.compute_loss
    gc.collect()
    weights, activations = _weights(), 0
    cuda = device.type == "cuda"
    with LiveBytes() as live:

        def alive() -> int:
            return torch.cuda.memory_allocated(device) if cuda else live.now

        def watched(model: Any, batch: Any) -> dict[str, torch.Tensor]:
            nonlocal activations
            before = alive()
            terms = loss(model, batch)
            activations = alive() - before
            return terms

        small.stage.compute_loss = watched
        forget_peak()
        small.step()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        live.begin_peak()
        with flop_counter() as flops:
            small.step()
        gradients = sum(item.grad.nbytes for item in small.parameters if item.grad is not None)
        state = _num_bytes(small.optimizer.state_dict())
        peak = torch.cuda.max_memory_allocated(device) if cuda else weights + live.peak
    small.stage.compute_loss = loss
    num_micro = small.stage.config.gradient_accumulation_steps
    return Point(
        batch_size=small.stage.config.batch_size,
        weights=weights, gradients=gradients, optimizer=state, activations=activations, peak=peak,
        resident=peak_resident(), flops=flops.get_total_flops() / num_micro,
        trained=sum(item.numel() for item in small.parameters),
    )  # fmt: skip


def _weights() -> int:
    """Bytes of all modules that there are: the stage's own, and those that it only uses."""
    modules = [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]
    tensors = [item for module in modules for item in (*module.parameters(False), *module.buffers(False))]
    return sum({item.data_ptr(): item.nbytes for item in tensors}.values())


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_num_bytes, items))


def forget_peak() -> None:
    """Let the system count this process's peak anew; where it cannot, the peak so far stands."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most memory that this process has had, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _CudaAutocast(TorchFunctionMode):
    """Computes in fp32 what autocast on CUDA does, and on the CPU does not."""

    _IN_FP32 = ("layer_norm", "group_norm", "softmax", "log_softmax", "norm", "exp", "log", "pow", "cumsum", "rsqrt")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in self._IN_FP32 and torch.is_autocast_enabled("cpu"):
            args = [item.float() if _is_half(item) else item for item in args]
        return func(*args, **kwargs)


def _is_half(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.dtype in (torch.bfloat16, torch.float16)


# ---- time ----


def measure(request: Request, precision: Precision, seconds: float, fits: dict[str, int]) -> dict[str, float]:
    """Seconds of a step of each phase, as it is configured, on samples as they usually are.

    Args:
        request: which stage and configuration.
        precision: how and where it computes.
        seconds: to spend on each phase.
        fits: the largest batch of each phase that may be tried here; for larger ones the time is scaled.
    """
    scale: dict[str, float] = {}
    most = 1

    def change(phase: PhaseConfig) -> PhaseConfig:
        nonlocal most
        size = min(phase.batch_size, max(1, min(fits.values())))
        most = max(most, size)
        return dataclasses.replace(phase, batch_size=size, max_steps=10**6)

    phases = {name: values["batch_size"] for name, values in request.values.items() if name in fits}
    most = max(min(size, max(1, min(fits.values()))) for size in phases.values())
    found = {}
    with rehearsal(request, precision, change, Wanted(2 * most, longest=False)) as small:
        for name in small.phases():
            scale[name] = phases[name] / small.stage.config.batch_size
            found[name] = scale[name] * _typical_step(small, seconds)
    return found


def _typical_step(small: Rehearsal, seconds: float) -> float:
    """The median time of a step over so many seconds, after one to warm up."""
    device = small.precision.device

    def timed() -> float:
        started = time.perf_counter()
        small.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    first, times = timed(), list[float]()
    while sum(times) + (first if not times else 0.0) < seconds or len(times) < 1:
        times.append(timed())
    return statistics.median(times)


# ---- the process ----


def heap_growth(request: Request, on_cpu: Precision, costs: list[PhaseCost]) -> float:
    """Bytes by which this process grows for each byte of tensors, from the smallest batch to one that can be seen.

    All phases together: the heap keeps what one of them leaves, so that only the largest makes it grow.
    """

    def rows(cost: PhaseCost) -> int:
        sizes = range(request.batch_sizes[-1], MOST + 1)
        return next((size for size in sizes if cost.peak("cpu", size) - cost.cpu[0].peak > _SEEN), MOST)

    largest = max(costs, key=lambda cost: cost.peak("cpu", request.batch_sizes[-1]))
    found = list(count(request, on_cpu, "cpu", rows(largest)).values())
    smallest = [cost.cpu[0] for cost in costs]
    resident, tensors = (
        max(getattr(point, key) for point in found) - max(getattr(point, key) for point in smallest)
        for key in ("resident", "peak")
    )
    return max(1.0, resident / max(1, tensors))


def rehearse(request: Request, config: StageConfig) -> list[PhaseCost]:
    """Everything that a plan needs to know of a configuration."""
    here = setup_compute(dataclasses.replace(config.run, device=request.device))
    on_cpu = setup_compute(dataclasses.replace(config.run, device="cpu"))
    points: dict[str, dict[str, list[Point]]] = {}
    program = 0
    for kernels in ("cpu", "cuda"):
        place = here if kernels == here.device.type else on_cpu
        if kernels == "cuda" and place is on_cpu and config.run.use_amp:
            place = Precision(on_cpu.device, torch.bfloat16)
        for batch_size in request.batch_sizes:
            for name, point in count(request, place, kernels, batch_size).items():
                points.setdefault(name, {}).setdefault(kernels, []).append(point)
                if kernels == "cpu" and not program:
                    program = max(0, point.resident - point.peak)
    costs = [
        PhaseCost(name=name, cpu=tuple(found["cpu"]), cuda=tuple(found["cuda"]), program=program)
        for name, found in points.items()
    ]
    heap = heap_growth(request, on_cpu, costs)
    costs = [dataclasses.replace(cost, heap=heap) for cost in costs]
    if request.seconds:
        kind = here.device.type
        room = (
            int(0.8 * request.memory) if kind == "cpu" else torch.cuda.get_device_properties(here.device).total_memory
        )
        fits = {cost.name: cost.largest_batch(kind, room) for cost in costs}
        times = measure(request, here, request.seconds, fits)
        costs = [dataclasses.replace(cost, seconds=times[cost.name], device=_name(here.device)) for cost in costs]
    return costs


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"this CPU, {torch.get_num_threads()} threads"


def main(path: Path) -> None:
    """Read a request and write what was found beside it, as ``<name>.found.json``."""
    die_with_parent()  # who asked is not there to hear the answer
    request = Request.from_dict(json.loads(path.read_text(encoding="utf-8")))
    config = from_dict(config_class(load_script(request.script)), request.values, request.where)
    caches = data_memory(_stage(request).kind, to_dict(config))
    found = {"phases": [dataclasses.asdict(cost) for cost in rehearse(request, config)], "caches": caches}
    path.with_suffix(".found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(user_errors(functools.partial(main, Path(sys.argv[1]))))
