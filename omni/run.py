"""`omni run`: data, stages A to E, evaluation, samples and report, each once, from wherever the last run stopped.

Data, stages and evaluation are processes of their own; stages that do not need each other run side by side. This one
needs no torch, so what is complete is passed over at once: a stage by the summary inside its final checkpoint,
evaluation and report by the checksums they were made from.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.atomic import write_whole
from omni.config import UserError
from omni.predictions import predictions_beside, read_predictions
from omni.processes import Children, usable_cores
from omni.report import Figures, Told, results_table, write_report
from omni.sample import Sample, samples_text
from omni.stages import STAGES, StageInfo, read_raw_config, stage_of, stages_of
from omni.summary import DamagedCheckpointError, fingerprint, read_summary

_ROOT = Path(__file__).parent.parent  # the stage scripts stand beside the package
_NUM_SAMPLES = 2  # of each kind and stage, to see and hear in the report


@dataclass
class RunFolder:
    """``runs/<size>``: what the run itself leaves (figures, samples, report) and when each step was done."""

    path: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, size: str) -> RunFolder:
        """The folder of a size; an unreadable record is an empty one, and its steps are done again."""
        folder = cls(Path("runs") / size)
        try:
            folder.steps = dict(json.loads((folder.path / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            folder.steps = {}
        return folder

    def done_with(self, step: str, made_from: dict[str, str], file: str) -> bool:
        """Whether ``file`` was made by a step from these very inputs."""
        recorded = self.steps.get(step)
        return bool(recorded and recorded["made_from"] == made_from and (self.path / file).exists())

    def record(self, step: str, made_from: dict[str, str], seconds: float) -> None:
        """Note that a step is done."""
        ended = round(time.time(), 1)
        self.steps[step] = {"made_from": made_from, "seconds": round(seconds, 1), "ended": ended}
        write_whole(self.path / "state.json", (json.dumps(self.steps, indent=1) + "\n").encode())

    def wall_seconds(self) -> float:
        """How long all steps took; where two were done at a time, that time counts once."""
        steps, until = self.steps.values(), 0.0
        total: float = sum(step["seconds"] for step in steps if "ended" not in step)  # of runs of old, one at a time
        dated = [step for step in steps if "ended" in step]
        for began, ended in sorted((step["ended"] - step["seconds"], step["ended"]) for step in dated):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total

    def read(self, file: str) -> Any:
        """A JSON file of the folder."""
        return json.loads((self.path / file).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: in ``state.json``.
        title: for people.
        complete: whether nothing is left to do; asked when all that it needs is done.
        made_from: checksums of what it works on.
        needs: names of the steps that come before it.
        command: the process that does it, or None where ``work`` does it here.
        work: the same as a function.
        letter: of a stage.
        divisible: whether it may be given a part of the cores.
    """

    name: str
    title: str
    complete: Callable[[], bool]
    made_from: Callable[[], dict[str, str]] = dict
    needs: tuple[str, ...] = ()
    command: list[str] | None = None
    work: Callable[[], None] | None = None
    letter: str = ""
    divisible: bool = False


def run(size: str, dry_run: bool = False, jobs: int = 0) -> int:
    """Do what is left to do and show what came of it; returns the exit code.

    Args:
        size: whose configurations.
        dry_run: show the steps and do none.
        jobs: stages that may be trained side by side; 0: two, or one where there is a GPU or a single core. Small
            models use two cores with one thread each better than one model uses both.

    Raises:
        UserError: when there are no configurations of this size here, or for a negative number of jobs.
    """
    if jobs < 0:
        raise UserError(f"--jobs: found {jobs}, expected how many stages may be trained side by side")
    folder = RunFolder.open(size)
    steps = plan(size, folder)
    began = time.perf_counter()
    if dry_run:
        for number, step in enumerate(steps, 1):
            left = "complete, skipped" if step.complete() else shown(step.command)
            print(f"[{number}/{len(steps)}] {step.title}: {left}")
        return 0
    with Children() as children:
        code = Work(steps, folder, children, jobs or usual_jobs()).to_the_end()
    if code:
        return code
    print(f"everything is done; this command took {_clock(time.perf_counter() - began)}\n")
    _show(folder)
    return 0


def usual_jobs() -> int:
    """How many stages are trained side by side; a GPU has room for one."""
    return 1 if shutil.which("nvidia-smi") else min(2, usable_cores())


def shown(command: Sequence[str] | None) -> str:
    """A command as a person would type it."""
    return shlex.join(["python", *command[1:]]) if command else "in this process"


class Work:
    """The steps of a run, each begun as soon as what it needs is done and there is room beside the others."""

    def __init__(self, steps: Sequence[Step], folder: RunFolder, children: Children, jobs: int) -> None:
        self.steps = {step.name: step for step in steps}
        self.heads = {step.name: f"[{number}/{len(steps)}] {step.title}" for number, step in enumerate(steps, 1)}
        self.folder, self.children, self.jobs = folder, children, jobs
        self.done: set[str] = set()
        self.incomplete: set[str] = set()  # those that were asked
        self.began: dict[str, float] = {}
        self.code = 0

    def to_the_end(self) -> int:
        """Do everything, or stop all of it where one step fails or a signal comes; returns the exit code."""
        while len(self.done) < len(self.steps) and not self.code:
            self._begin()
            if len(self.children):
                self._end(*self.children.wait())
        while len(self.children):
            self._end(*self.children.wait())
        return self.code

    def _begin(self) -> None:
        """Begin what can begin now, and pass over what is complete."""
        while ready := self._ready():
            alone = len(ready) == 1 and not len(self.children)
            if len(self.children) == self.jobs or self.code:
                return
            step = ready[0]
            self.began[step.name] = time.perf_counter()
            command = list(step.command or ())
            if step.divisible and not alone and self.jobs > 1:
                command += ["--num_threads", str(max(1, usable_cores() // self.jobs))]
            print(f"{self.heads[step.name]}: {shown(command)}", flush=True)
            if step.work is not None:
                step.work()
                self._end(step.name, 0)
            else:
                self.children.start(step.name, command, "" if alone or self.jobs == 1 else f"{step.letter} | ")

    def _ready(self) -> list[Step]:
        """The steps that are not complete and could begin."""
        found: list[Step] = []
        for step in self.steps.values():
            if step.name in self.done or step.name in self.began or not self.done.issuperset(step.needs):
                continue
            if step.name not in self.incomplete and step.complete():
                print(f"{self.heads[step.name]}: complete, skipped", flush=True)
                self.done.add(step.name)
            else:
                self.incomplete.add(step.name)
                found.append(step)
        return found

    def _end(self, name: str, code: int) -> None:
        """Note the end of a step; the first that fails stops the others, which save what they have."""
        seconds, told = time.perf_counter() - self.began[name], self.children.told
        if code:
            head = f"{self.heads[name]}: stopped with exit code {code} after {_clock(seconds)}"
            print(f"{head}; the same command continues", flush=True)
            if not self.code and not told:
                self.children.tell(signal.SIGINT)
        else:
            self.done.add(name)
            self.folder.record(name, self.steps[name].made_from(), seconds)
            print(f"{self.heads[name]}: done in {_clock(seconds)}", flush=True)
        self.code = self.code or code or (128 + told[0] if told else 0)


def plan(size: str, folder: RunFolder) -> list[Step]:
    """All steps of a run, in order."""
    stages = stages_of(size)
    configs = [read_raw_config(stage.config_path(size)) for stage in stages]
    world = Path("data") / size / "world.json"
    steps = [
        Step("data", f"data: the micro-world in {world.parent}", lambda: _world_is_whole(world),
             command=_omni("data", "synth", "--size", size, "--out", "data")),
    ]  # fmt: skip
    for stage, values in zip(stages, configs, strict=True):
        command = [sys.executable, str(_script(stage)), "--config", str(stage.config_path(size))]
        title = f"stage {stage.letter}, {stage.title}"
        complete = _stage_check(stage, size, values)
        needs = ("data", *(stage_of(kind).prefix for kind in stage.needs_of(values)))
        if stage is STAGES[-1]:  # with all cores to itself: nothing could be done beside it for long
            needs = tuple(step.name for step in steps)
        divisible = not values.get("run", {}).get("num_threads")
        made_from = _hash_of(stage, size)
        steps.append(
            Step(stage.prefix, title, complete, made_from, needs, command, letter=stage.letter, divisible=divisible)
        )
    trained = tuple(step.name for step in steps)
    steps.append(
        Step("evaluation", "evaluation on held-out data",
             lambda: folder.done_with("evaluation", _hashes(size), "eval.predictions.jsonl"), lambda: _hashes(size),
             trained, _omni("eval", "--size", size, "--json", str(folder.path / "eval.json"),
                   "--predictions", str(predictions_beside(folder.path / "eval.json")), "--quiet"))
    )  # fmt: skip
    steps.append(
        Step("samples", "samples of what each stage does",
             lambda: folder.done_with("samples", _hashes(size), "samples.json"), lambda: _hashes(size),
             ("evaluation",), work=lambda: _make_samples(size, folder))
    )  # fmt: skip
    steps.append(
        Step("report", f"report: {folder.path / 'report.html'}",
             lambda: folder.done_with("report", _hashes(size), "report.html"), lambda: _hashes(size),
             ("samples",), work=lambda: _make_report(size, folder))
    )  # fmt: skip
    return steps


# ---- what is complete ----


def _world_is_whole(world: Path) -> bool:
    from omni.data.synthetic import VERSION

    try:
        return bool(json.loads(world.read_text(encoding="utf-8"))["version"] == VERSION)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stage_check(stage: StageInfo, size: str, values: dict[str, Any]) -> Callable[[], bool]:
    return lambda: stage_is_complete(stage, size, values)


def stage_is_complete(stage: StageInfo, size: str, values: dict[str, Any]) -> bool:
    """Whether the final checkpoint is the one that this configuration and today's inputs would give.

    In any doubt the answer is no: the stage's script then looks closer, continues, or says what is wrong.
    """
    path = stage.checkpoint(size)
    try:
        summary = read_summary(path)
        lineage = summary["lineage"]
        # a stage that did without an input, as a Talker may without the Thinker, names none
        used = [kind for kind in stage.needs if lineage.get(kind) is not None]
        same_inputs = all(lineage[kind] == fingerprint(stage_of(kind).checkpoint(size)) for kind in used)
    except DamagedCheckpointError as error:
        print(error)
        return False
    except UserError:
        return False
    return same_inputs and _holds(summary["config"], values)


def _holds(resolved: Any, given: Any) -> bool:
    """Whether a resolved configuration has every value of a configuration file."""
    if isinstance(given, dict):
        return isinstance(resolved, dict) and all(
            key in resolved and _holds(resolved[key], value) for key, value in given.items()
        )
    return bool(resolved == given)


def _hash_of(stage: StageInfo, size: str) -> Callable[[], dict[str, str]]:
    return lambda: {stage.prefix: fingerprint(stage.checkpoint(size))}


def _hashes(size: str) -> dict[str, str]:
    paths = {stage.prefix: stage.checkpoint(size) for stage in stages_of(size)}
    return {name: fingerprint(path) for name, path in paths.items() if path.exists()}


# ---- doing it ----


def _omni(*words: str) -> list[str]:
    return [sys.executable, "-m", "omni.cli", *words]


def _script(stage: StageInfo) -> Path:
    here = Path(stage.script)
    return here if here.exists() else _ROOT / stage.script


def _make_samples(size: str, folder: RunFolder) -> None:
    from omni.evaluate.samples import samples_of_size

    found = {}
    for stage in STAGES:
        samples = samples_of_size(size, stage.kind, folder.path / "samples" / stage.prefix, _NUM_SAMPLES)
        found[stage.kind] = [sample.to_dict() for sample in samples]
    write_whole(folder.path / "samples.json", (json.dumps(found, indent=1) + "\n").encode())


def _make_report(size: str, folder: RunFolder) -> None:
    seconds = {name: step["seconds"] for name, step in folder.steps.items()}
    sets = read_predictions(predictions_beside(folder.path / "eval.json")).sets
    told = Told(_figures(folder), sets, _samples(folder), seconds, folder.wall_seconds())
    write_report(folder.path / "report.html", size, told)


def _figures(folder: RunFolder) -> Figures:
    return dict(folder.read("eval.json"))


def _samples(folder: RunFolder) -> dict[str, list[Sample]]:
    return {kind: [Sample.from_dict(item) for item in found] for kind, found in folder.read("samples.json").items()}


def _show(folder: RunFolder) -> None:
    """What a person wants to see at the end."""
    print(results_table(_figures(folder)))
    print(f"\nexamples:\n{samples_text(_samples(folder)['omni'][::_NUM_SAMPLES])}")
    print(f"\nreport: {folder.path / 'report.html'}")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
