"""Where a run is killed: named moments, each a function of the code and a place before, inside or after its k-th call.

A child of the fork server calls :func:`install` before the stage starts. The kill is SIGKILL to itself, so nothing of
Python's or torch's runs after it. A file is cut in half by writing all of it, cutting, and dying: what is then on the
disk is what a kill in the middle of the write leaves.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import random
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

LOOP = "omni.training_utils:Loop"
SLACK = 4  # steps in which a moment must come; else the next step is the moment


@dataclass(frozen=True)
class Moment:
    """A call of ``attribute`` of ``owner``, given as ``module`` or ``module:class``."""

    owner: str
    attribute: str
    when: Literal["before", "halfway", "after"]


IN_A_STEP = {
    "batch read": Moment("omni.data.stream:BatchStream", "__next__", "after"),
    "between forward and backward": Moment(LOOP, "_weighted", "after"),
    "between backward and update": Moment("omni.training_utils", "clip_gradients", "before"),
    "after the update": Moment(LOOP, "_update", "after"),
    "before a line of metrics": Moment("omni.tracking:MetricsLog", "write", "before"),
    "half a line of metrics": Moment("omni.tracking:MetricsLog", "write", "halfway"),
    "after a line of metrics": Moment("omni.tracking:MetricsLog", "write", "after"),
    "before validation": Moment(LOOP, "_validate", "before"),
    "mid-evaluation": Moment(LOOP, "_validate", "halfway"),
    "after validation": Moment(LOOP, "_validate", "after"),
    "before saving": Moment("torch", "save", "before"),
    "half a checkpoint": Moment("torch", "save", "halfway"),
    "checkpoint without summary": Moment("omni.checkpoint", "_digest", "after"),
    "summary without directory": Moment("zipfile:ZipFile", "writestr", "after"),
    "before the rename": Moment("pathlib:Path", "replace", "before"),
    "after the rename": Moment("pathlib:Path", "replace", "after"),
    "before pruning": Moment("omni.checkpoint", "prune", "before"),
    "while pruning": Moment("pathlib:Path", "unlink", "before"),
    "after pruning": Moment("omni.checkpoint", "prune", "after"),
}
AT_THE_START = {
    "half a small file": Moment("pathlib:Path", "write_bytes", "halfway"),
    "half a cached file": Moment("numpy", "savez", "halfway"),
    "folder claimed": Moment("omni.training_utils", "claim_folder", "after"),
    "weights loaded": Moment("omni.save_folder:SaveFolder", "resume", "after"),
    "metrics cut": Moment("omni.tracking:MetricsLog", "__init__", "after"),
    "optimizer restored": Moment("omni.training_utils", "restore_optimizer", "after"),
    "random state restored": Moment("omni.training_utils", "restore_random_state", "after"),
}
BETWEEN_PHASES = {
    "before the next phase": Moment("omni.training_types:RunState", "next_phase", "before"),
    "after the next phase": Moment("omni.training_types:RunState", "next_phase", "after"),
    "next phase seeded": Moment("omni.training_utils", "seed_everything", "after"),
    "next phase's cache": Moment("numpy", "savez", "halfway"),
}
MOMENTS = IN_A_STEP | AT_THE_START | BETWEEN_PHASES
DELAY = "random delay"


@dataclass(frozen=True)
class Plan:
    """One kill: the ``call``-th time of a moment (or ``delay`` seconds) from step ``from_step`` of the run on."""

    moment: str
    from_step: int  # over all phases; -1: from the launch on
    call: int = 1
    delay: float = 0.0
    last_step: int = 10**9  # killed before the step after it, in any case

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plans(rng: random.Random, phases: int, steps: int) -> list[Plan]:
    """At least 20 kills for a run of ``phases`` of ``steps`` steps, in the order of the steps they come at."""
    total = phases * steps
    named = [*IN_A_STEP, *[DELAY] * 5]
    rng.shuffle(named)
    found = [(1 + number * (total - 6) // len(named), name, False) for number, name in enumerate(named)]
    # the first three write what is written once
    found += [(0 if name in list(AT_THE_START)[:3] else rng.randrange(total - 6), name, True) for name in AT_THE_START]
    found += [(rng.randrange(total - 6), DELAY, True) for _ in range(3)]
    found = rng.sample(found, 24)  # all of them take minutes for each stage; together the runs have every moment
    ordered = [_plan(rng, at, name, launch, steps) for at, name, launch in found]
    for end in range(steps, total, steps):
        for name in BETWEEN_PHASES if end + steps == total else list(BETWEEN_PHASES)[:3]:
            # from the launch on: an attempt may begin with what follows the last step of a phase
            ordered.append((end - 1, Plan(name, -1, 2 if name == "next phase seeded" else 1, 0.0, end + SLACK)))
    ordered += [
        (total - 1, Plan(name, total - 1, rng.randint(1, 2))) for name in ("half a checkpoint", "after the rename")
    ]
    return [plan for _, plan in sorted(ordered, key=lambda item: item[0])]


def _plan(rng: random.Random, at: int, name: str, launch: bool, steps: int) -> tuple[int, Plan]:
    """A kill and the step at which it comes; it never takes the run into the next phase."""
    if at % steps >= steps - 3:
        at += 3
    most = 6 if name in ("batch read", "between forward and backward") else 2  # those come three times a step
    delay = rng.uniform(0.0, 0.6 if launch else 0.15)
    last_step = min(at + SLACK, (at // steps + 1) * steps - 2)
    return at, Plan(name, -1 if launch else at, 1 if launch else rng.randint(1, most), delay, last_step)


def install(plan: Plan, pipe: int) -> None:
    """Prepare this process to die as planned; what it dies of is written to ``pipe``."""
    assassin = _Assassin(plan, pipe)
    if plan.moment != DELAY:
        assassin.wrap(MOMENTS[plan.moment], assassin.strike)
    assassin.wrap(Moment(LOOP, "_step", "before"), assassin.count_step)
    if plan.from_step < 0:
        assassin.arm()


def send_at(step: int, number: int) -> None:
    """Send a signal to this process and all its workers, as a terminal or a batch system does, before a step."""
    from omni.training_utils import Loop

    real = Loop._step

    def wrapped(loop: Loop, *arguments: Any) -> None:
        if loop.state.total_step == step:
            os.killpg(0, number)
        real(loop, *arguments)

    Loop._step = wrapped  # type: ignore[method-assign]


class _Assassin:
    """Counts calls once it is armed, and kills at the one that is planned."""

    def __init__(self, plan: Plan, pipe: int) -> None:
        self.plan, self.pipe = plan, pipe
        self.armed, self.calls = False, 0

    def arm(self) -> None:
        if not self.armed:
            self.armed = True
            if self.plan.moment == DELAY:
                os.write(self.pipe, b"armed\n")  # the server's clock starts

    def die(self, name: str) -> NoReturn:
        os.write(self.pipe, f"{name}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process does not get here")

    def wrap(self, moment: Moment, around: Callable[..., Any]) -> None:
        module, _, name = moment.owner.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, name) if name else owner
        real = getattr(owner, moment.attribute)

        @functools.wraps(real)
        def wrapped(*arguments: Any, **keys: Any) -> Any:
            return around(moment, functools.partial(real, *arguments, **keys))

        setattr(owner, moment.attribute, wrapped)

    def count_step(self, moment: Moment, call: functools.partial[Any]) -> Any:
        step = call.args[0].state.total_step
        if step >= self.plan.from_step:
            self.arm()
        if step > self.plan.last_step:
            self.die("step")
        return call()

    def strike(self, moment: Moment, call: functools.partial[Any]) -> Any:
        if not self.armed:
            return call()
        self.calls += 1
        if self.calls < self.plan.call:
            return call()
        if moment.when == "before":
            self.die(self.plan.moment)
        if moment.when == "halfway" and moment.attribute == "_validate":
            self._die_inside(self.plan.call * 7)
        call()
        if moment.when == "halfway" and moment.attribute != "_validate":
            _cut(call.args)
        return self.die(self.plan.moment)

    def _die_inside(self, count: int) -> None:
        """At the ``count``-th module that computes; an evaluation with fewer dies at its end."""
        from torch.nn.modules.module import register_module_forward_hook

        left = iter(range(count))
        register_module_forward_hook(lambda *_: None if next(left, None) is not None else self.die(self.plan.moment))


def _cut(arguments: tuple[Any, ...]) -> None:
    """Take away half of the file just written, or of the line just added to a log."""
    log = getattr(arguments[0], "_file", None)
    file = log or next(item for item in arguments if isinstance(item, (Path, io.IOBase)))
    if isinstance(file, io.IOBase):
        file.flush()
    path = Path(file if isinstance(file, Path) else file.name)
    size = path.stat().st_size
    os.truncate(path, size - 40 if log else size // 2)
