"""`omni run`: data, stages A to E, evaluation, samples and report, each once, from wherever the last run stopped.

Data, stages and evaluation are processes of their own. This one needs no torch, so what is complete is passed over at
once: a stage by the summary inside its final checkpoint, evaluation and report by the checksums they were made from.
"""

from __future__ import annotations

import ctypes
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.atomic import write_whole
from omni.config import UserError
from omni.predictions import predictions_beside, read_predictions
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
        self.steps[step] = {"made_from": made_from, "seconds": round(seconds, 1)}
        write_whole(self.path / "state.json", (json.dumps(self.steps, indent=1) + "\n").encode())

    def read(self, file: str) -> Any:
        """A JSON file of the folder."""
        return json.loads((self.path / file).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: in ``state.json``.
        title: for people.
        complete: whether nothing is left to do.
        made_from: checksums of what it works on.
        command: the process that does it, or None where ``work`` does it here.
        work: the same as a function.
    """

    name: str
    title: str
    complete: Callable[[], bool]
    made_from: Callable[[], dict[str, str]] = dict
    command: list[str] | None = None
    work: Callable[[], None] | None = None


def run(size: str, dry_run: bool = False) -> int:
    """Do what is left to do and show what came of it; returns the exit code.

    Raises:
        UserError: when there are no configurations of this size here.
    """
    folder = RunFolder.open(size)
    steps = plan(size, folder)
    began = time.perf_counter()
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {step.title}"
        if step.complete():
            print(f"{head}: complete, skipped", flush=True)
            continue
        shown = shlex.join(["python", *step.command[1:]]) if step.command else "in this process"
        print(f"{head}: {shown}", flush=True)
        if dry_run:
            continue
        started = time.perf_counter()
        code = _do(step)
        seconds = time.perf_counter() - started
        if code:
            print(f"{head}: stopped with exit code {code} after {_clock(seconds)}; the same command continues")
            return code
        folder.record(step.name, step.made_from(), seconds)
        print(f"{head}: done in {_clock(seconds)}", flush=True)
    if not dry_run:
        print(f"everything is done; this command took {_clock(time.perf_counter() - began)}\n")
        _show(folder)
    return 0


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
        steps.append(Step(stage.prefix, title, complete, _hash_of(stage, size), command))
    steps.append(
        Step("evaluation", "evaluation on held-out data",
             lambda: folder.done_with("evaluation", _hashes(size), "eval.predictions.jsonl"), lambda: _hashes(size),
             _omni("eval", "--size", size, "--json", str(folder.path / "eval.json"),
                   "--predictions", str(predictions_beside(folder.path / "eval.json")), "--quiet"))
    )  # fmt: skip
    steps.append(
        Step("samples", "samples of what each stage does",
             lambda: folder.done_with("samples", _hashes(size), "samples.json"), lambda: _hashes(size),
             work=lambda: _make_samples(size, folder))
    )  # fmt: skip
    steps.append(
        Step("report", f"report: {folder.path / 'report.html'}",
             lambda: folder.done_with("report", _hashes(size), "report.html"), lambda: _hashes(size),
             work=lambda: _make_report(size, folder))
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
        inputs = {kind: fingerprint(stage_of(kind).checkpoint(size)) for kind in stage.needs}
    except DamagedCheckpointError as error:
        print(error)
        return False
    except UserError:
        return False
    lineage = summary["lineage"]
    # a stage that did without an input, as a Talker may without the Thinker, names none
    same_inputs = all(lineage.get(kind) in (None, value) for kind, value in inputs.items())
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


def _do(step: Step) -> int:
    if step.command is not None:
        return run_process(step.command)
    assert step.work is not None
    step.work()
    return 0


def run_process(command: Sequence[str]) -> int:
    """Run a process to its end and return its exit code, 128 + n when signal n ended it.

    It has a process group of its own: Ctrl-C in a terminal reaches a whole group, and a stage that is told twice leaves
    without saving. Here it is told once for every time that this process is told.
    """
    previous: dict[int, Any] = {}
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        previous[name] = signal.signal(name, pass_on)
    try:
        child = subprocess.Popen(list(command), start_new_session=True, preexec_fn=_ends_with_parent())
        for number in early:
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _ends_with_parent() -> Callable[[], None] | None:
    """On Linux: the child gets SIGTERM when this process is killed, so that no stage trains on unseen."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return lambda: library.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
    write_report(folder.path / "report.html", size, Told(_figures(folder), sets, _samples(folder), seconds))


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
