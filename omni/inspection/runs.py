"""What stands in a path: one checkpoint, the folder of a run, or a folder of runs; also while they are written."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omni.config import UserError
from omni.curves import is_number, phases_of, read_metrics
from omni.files import file_problem, shown
from omni.inspection.facts import CheckpointFile, config_differences, read_checkpoint
from omni.stages import read_raw_config

_ROOT = Path(__file__).parent.parent.parent  # shipped configurations stand beside the package


class Problem(NamedTuple):
    """A file that cannot be read, and why."""

    path: Path
    text: str


@dataclass
class RunRecord:
    """One run: its checkpoints, its log, and what came of it.

    Attributes:
        folder: ``save_dir``.
        shown: the checkpoint that is described: the one that was asked for, or the newest; None where none is whole.
        checkpoints: all whole ones, oldest first.
        problems: the others.
        metrics: records of ``metrics.jsonl`` up to the checkpoint that was asked for, or all.
        holder: the process that writes here now; "" where there is none or the system does not say.
    """

    folder: Path
    shown: CheckpointFile | None
    checkpoints: list[CheckpointFile]
    problems: list[Problem]
    metrics: list[dict[str, Any]]
    holder: str = ""

    @property
    def final(self) -> CheckpointFile | None:
        """The checkpoint of a finished run."""
        return next((item for item in self.checkpoints if item.role == "final"), None)

    @property
    def newest_resumable(self) -> CheckpointFile | None:
        """The one that the same command would go on from."""
        found = [item for item in self.checkpoints if item.facts.resumable and item.role in ("final", "periodic")]
        return max(found, key=lambda item: (item.facts.total_step, item.role == "final"), default=None)

    @property
    def state(self) -> str:
        """In one word or two: running, finished, stopped, no checkpoint."""
        if self.holder:
            return "running"
        if self.final is not None and self.final is self.newest_resumable:
            return "finished"
        return "stopped" if self.newest_resumable else "no checkpoint"

    @property
    def shipped(self) -> Path | None:
        """The shipped configuration of the same name."""
        if self.shown is None:
            return None
        name = f"{self.shown.name}.json"
        places = (folder / "configs" / name for folder in (Path(), _ROOT) if Path(name).name == name)
        return next((path for path in places if not file_problem(path)), None)

    def differences(self) -> list[tuple[str, Any, Any]]:
        """What the configuration says that the shipped one does not: ``(key, shipped, here)``."""
        path = self.shipped
        return config_differences(self.shown.facts, read_raw_config(path)) if path and self.shown else []


@dataclass(frozen=True)
class Validation:
    """The validations of a phase.

    Attributes:
        monitor: the figure that says which is the best.
        best: ``(step, value)`` of it, where the log has it.
        last: the newest figures and their step, which is None where only a checkpoint has them.
    """

    phase: str
    monitor: str
    best: tuple[int, float] | None
    last_step: int | None
    last: dict[str, float]


@dataclass
class Inspection:
    """Everything that stands in a path. ``what`` is checkpoint, run or folder."""

    path: Path
    what: str
    runs: list[RunRecord] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)  # of files that belong to no run


def inspect(path: Path) -> Inspection:
    """Look at a checkpoint, at the folder of a run, or at a folder of runs.

    Raises:
        UserError: when there is nothing of the kind at ``path``, or it is a single file that cannot be read.
    """
    if path.is_dir():
        if run := _run(path):
            return Inspection(path, "run", [run])
        runs = [run for folder in sorted(path.iterdir()) if folder.is_dir() and (run := _run(folder))]
        if not runs:
            raise UserError(
                f"{path}: found no checkpoint and no metrics.jsonl, expected a checkpoint, a run's save_dir, or a "
                "folder of them such as checkpoints/"
            )
        return Inspection(path, "folder", runs)
    checkpoint = read_checkpoint(path)
    run = _run(path.absolute().parent) or RunRecord(path.parent, None, [], [], [])
    facts = checkpoint.facts
    metrics = [record for record in run.metrics if _until(record, facts.phases, facts.phase, facts.step)]
    own = RunRecord(path.parent, checkpoint, run.checkpoints, [], metrics, run.holder)
    return Inspection(path, "checkpoint", [own])


def _until(record: dict[str, Any], phases: Sequence[str], phase: str, step: int) -> bool:
    """Whether a record was written before a checkpoint was."""
    if record["phase"] not in phases:
        return False
    return (phases.index(record["phase"]), record["step"]) <= (phases.index(phase), step)


def _run(folder: Path) -> RunRecord | None:
    """The run of a folder; None where nothing in it is of a run."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.endswith((".pt", ".pt.damaged")))
    except OSError as error:
        return RunRecord(folder, None, [], [Problem(folder, f"cannot be read ({error.strerror})")], [])
    paths = [path for path in paths if not path.name.startswith(".")]
    log = folder / "metrics.jsonl"
    if not paths and not log.is_file():
        return None
    found, problems = [], []
    for path in paths:
        try:
            found.append(read_checkpoint(path))
        except UserError as error:
            if path.exists() or path.is_symlink():  # else a run has pruned it just now
                problems.append(Problem(path, str(error).removeprefix(f"{path}: ")))
        except FileNotFoundError:
            continue
    found.sort(key=lambda item: (item.facts.total_step, item.role == "final"))
    run = RunRecord(folder, None, found, problems, read_metrics(log) if log.is_file() else [], _holder(folder))
    run.shown = run.newest_resumable or (found[-1] if found else None)
    return run


def _holder(folder: Path) -> str:
    """Who holds the lock of :func:`omni.checkpoint.claim_folder`; asking takes no lock, so it disturbs nobody."""
    if not sys.platform.startswith("linux"):
        return ""
    try:
        with (folder / ".lock").open(encoding="utf-8", errors="replace") as file:
            # struct flock of 64-bit Linux: type, whence, start, length, process
            question = struct.pack("@hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack("@hhqqi0q", fcntl.fcntl(file, fcntl.F_GETLK, question))
            return (shown(file.read(200).strip()) or "a process") if kind != fcntl.F_UNLCK else ""
    except (OSError, ValueError):
        return ""


def validations(run: RunRecord) -> list[Validation]:
    """Best and last validation of every phase, from the log, or else from the checkpoint."""
    if run.shown is None:
        return []
    found = []
    for phase in dict.fromkeys([*run.shown.facts.phases, *phases_of(run.metrics)]):
        settings = run.shown.facts.config.get(phase)
        monitor = settings.get("monitor") if isinstance(settings, dict) else None
        largest = isinstance(settings, dict) and settings.get("monitor_mode") == "max"
        records = [item for item in run.metrics if (item["phase"], item["event"]) == (phase, "val")]
        points = [(item["step"], item[monitor]) for item in records if monitor and is_number(item.get(monitor))]
        best = (max if largest else min)(points, key=lambda point: point[1]) if points else None
        last = {key: item for key, item in records[-1].items() if is_number(item) and key != "step"} if records else {}
        figures = last or run.shown.facts.figures.get(phase, {})
        if figures:
            found.append(Validation(phase, str(monitor), best, records[-1]["step"] if records else None, figures))
    return found


def skipped(run: RunRecord) -> list[dict[str, Any]]:
    """The batches that were skipped, as the log has them."""
    return [record for record in run.metrics if record["event"] == "skip"]
