"""What `omni inspect` and `omni compare` found, as lines for a terminal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

from omni.config import short_json
from omni.curves import loss_curve, phases_of, text_plot
from omni.inspection.ancestry import Ancestor, ancestry, changed_inputs
from omni.inspection.facts import CheckpointFile, amounts, count, hours, size, value
from omni.inspection.runs import Inspection, Problem, RunRecord, skipped, validations


def columns() -> int:
    """Columns of the terminal, at most 110; of a log file 100."""
    return min(110, shutil.get_terminal_size((100, 24)).columns)


def printable(text: str) -> str:
    """Text that cannot steer a terminal, whatever a file had put into it; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def inspection_text(found: Inspection) -> str:
    """An :class:`Inspection` as lines."""
    if found.what == "folder":
        lines = list(_folder(found))
    else:
        lines = list(_run(found.runs[0], alone=found.what == "checkpoint"))
    return printable("\n".join(lines))


def aligned(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows as columns of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


# ---- a folder of runs ----

FOLDER_HEAD = ("run", "stage", "state", "at", "trained", "parameters", "size", "last validation", "checkpoint")


def folder_rows(found: Inspection) -> list[tuple[str, ...]]:
    """One row a run; see ``FOLDER_HEAD``."""
    return [_row(run) for run in found.runs if run.shown or not run.problems]


def _row(run: RunRecord) -> tuple[str, ...]:
    if run.shown is None:
        return (run.folder.name, "-", run.state, f"{log_position(run) or '-'}", "-", "-", "-", "-", "-")
    facts, stage = run.shown.facts, run.shown.stage
    last = next(reversed(validations(run)), None)
    figure = f"{last.monitor} {value(last.last.get(last.monitor))}" if last else "-"
    return (
        run.folder.name, stage.letter if stage else "-", run.state, position(run.shown), hours(facts.seconds),
        count(sum(facts.parameters.values())), size(run.shown.num_bytes), figure, facts.sha256[:12],
    )  # fmt: skip


def _folder(found: Inspection) -> Iterator[str]:
    rows = folder_rows(found)
    yield f"{found.path}: {len(found.runs)} runs"
    yield ""
    if rows:
        yield from aligned([FOLDER_HEAD, *rows])
    yield from problem_lines(found)
    roots = family_trees(found)
    if roots:
        yield "\nmade from (checksums of contents; `same`: the file there is still the one that was used)"
        for root in roots:
            yield from tree_lines(root)
    example = next((run.folder for run in found.runs if run.shown), found.path)
    yield f"\nCloser: omni inspect {example}   weights: --health   a page: --html FILE"


def problem_lines(found: Inspection) -> Iterator[str]:
    """One line a file that cannot be read."""
    problems = [*found.problems, *(problem for run in found.runs for problem in run.problems)]
    if problems:
        yield "\ncannot be read:"
        yield from (_problem(problem) for problem in problems)


def _problem(problem: Problem) -> str:
    return "  " + " ".join(f"{problem.path}: {problem.text}".split())


def family_trees(found: Inspection) -> list[Ancestor]:
    """The trees of all runs, but for those that are part of another's."""
    newest = [run.shown for run in found.runs if run.shown]
    trees = [ancestry(checkpoint, newest) for checkpoint in newest]
    used = {node.sha256 for tree in trees for node in _below(tree)}
    return [tree for tree in trees if tree.sha256 not in used]


def _below(tree: Ancestor) -> Iterator[Ancestor]:
    for node in tree.inputs:
        yield node
        yield from _below(node)


# ---- one run ----


def position(checkpoint: CheckpointFile) -> str:
    """Phase and step, as people say them."""
    facts = checkpoint.facts
    phase = f"{facts.phase} " if len(facts.phases) > 1 else ""
    return f"{phase}{facts.step:,} of {facts.max_steps:,}"


def log_position(run: RunRecord) -> str:
    """Where the log stands, if that is not where the checkpoint stands."""
    if not run.metrics:
        return ""
    phase, step = run.metrics[-1]["phase"], run.metrics[-1]["step"]
    if run.shown and (phase, step) == (run.shown.facts.phase, run.shown.facts.step):
        return ""
    return f"{phase} step {step:,}"


def headline(run: RunRecord) -> str:
    """What a run is, in one line."""
    if run.shown is None:
        return f"{run.folder}: {run.state}"
    stage = run.shown.stage
    what = f"stage {stage.letter}, {stage.title}" if stage else run.shown.facts.kind
    return f"{run.folder}: {what} ({run.shown.name}), {run.state}" + (f" by {run.holder}" if run.holder else "")


def facts_rows(run: RunRecord, alone: bool) -> list[tuple[str, str]]:
    """Everything that is one value: ``(name, text)``."""
    if run.shown is None:
        return []
    shown, facts = run.shown, run.shown.facts
    phases = f", phase {facts.phases.index(facts.phase) + 1} of {len(facts.phases)}" if len(facts.phases) > 1 else ""
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(shown.written))
    parts = sorted(((name, n) for name, n in facts.parameters.items() if n), key=lambda item: -item[1])
    total = sum(facts.parameters.values())
    weights = "fp32 weights" if facts.precision == "fp32" else f"fp32 weights, computed in {facts.precision}"
    log = [("log", f"has reached {log_position(run)}")] if log_position(run) and not alone else []
    return [
        ("checkpoint", f"{shown.path.name} ({size(shown.num_bytes)}), sha256 {facts.sha256[:12]}, written {written}"),
        ("at", f"{facts.phase} step {facts.step:,} of {facts.max_steps:,}{phases}; {facts.total_step:,} steps in all"),
        *log,
        ("trained", f"{hours(facts.seconds)} in steps"),
        *(("" if index else "seen", text) for index, text in enumerate(amounts(facts))),
        ("skipped", f"{facts.skipped:,} batches"),
        ("precision", weights),
        ("parameters", f"{count(total)}: " + ", ".join(f"{name} {count(number)}" for name, number in parts)),
        ("code", ", ".join(f"{key} {item}" for key, item in facts.code.items() if item)),
        ("resume", resume_text(run, alone)),
    ]


def resume_text(run: RunRecord, alone: bool) -> str:
    """Whether and from where the same command would go on."""
    shown, newest = run.shown, run.newest_resumable
    if shown is None:
        return "no checkpoint yet"
    if not shown.facts.resumable and (alone or newest is None):
        other = f"; the run goes on from {newest.path.name}" if newest else ""
        return f"no: {shown.path.name} holds weights alone{other}"
    if newest is None:
        return "yes, once it has its name in save_dir again"
    changed = changed_inputs(ancestry(shown))
    if changed:
        names = "; ".join(f"{node.path or node.kind}: {node.state}" for node in changed)
        return f"would be refused, since it was made from other files than stand there now ({names})"
    if newest.path.name != shown.path.name:
        return f"it could be, but the same command goes on from {newest.path.name}, which is newer"
    if newest.role == "final":
        return "finished: the same command has nothing left to do; with a larger max_steps it goes on"
    return "yes, the same command continues"


def difference_lines(run: RunRecord) -> list[str]:
    """The configuration beside the shipped one of the same name."""
    if run.shown is None:
        return []
    if run.shipped is None:
        return [f"configuration: {run.shown.name} (none of this name is shipped; --json shows all of it)"]
    found = [f"  {key}: {_config_value(there)} -> {_config_value(here)}" for key, there, here in run.differences()]
    unsure = "" if run.shown.facts.changed is not None else " (keys that the file does not name are not compared)"
    if not found:
        return [f"configuration: as shipped in {run.shipped}{unsure}"]
    return [f"configuration: differs from {run.shipped}{unsure} (shipped -> here)", *found]


def _config_value(item: Any) -> str:
    return "its default" if item is ... else short_json(item)


VALIDATION_HEAD = ("phase", "best", "last", "all of the last")


def validation_rows(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """Best and last validation of every phase; see ``VALIDATION_HEAD``."""
    rows = []
    for item in validations(run):
        best = f"{item.monitor} {value(item.best[1])} (step {item.best[0]:,})" if item.best else "-"
        step = f" (step {item.last_step:,})" if item.last_step is not None else ""
        last = f"{item.monitor} {value(item.last.get(item.monitor))}{step}"
        others = ", ".join(f"{name} {value(number)}" for name, number in item.last.items() if name != item.monitor)
        rows.append((item.phase, best, last, others or "-"))
    return rows


def skip_lines(run: RunRecord, most: int = 5) -> list[str]:
    """The newest skipped batches, with the reason and the rows of the user's files."""
    found = skipped(run)
    lines = []
    for record in found[-most:]:
        rows = record.get("rows")
        named = [str(row) for row in rows] if isinstance(rows, list) else []
        where = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
        lines.append(f"  {record['phase']} step {record['step']:,}: {record.get('why')}; rows {where or '-'}")
    if len(found) > most:
        lines.insert(0, f"  {len(found) - most:,} earlier ones, then")
    return lines


def checkpoint_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """One row a checkpoint file."""
    return [
        (item.path.name, position(item), size(item.num_bytes), item.facts.sha256[:12],
         "can be resumed" if item.facts.resumable else "weights alone")
        for item in run.checkpoints
    ]  # fmt: skip


def tree_lines(root: Ancestor) -> list[str]:
    """A tree of ancestors."""
    lines = [f"  {root.path or root.kind}  {root.sha256[:12]}"]
    _branches(root, "  ", lines)
    return lines


def _branches(node: Ancestor, indent: str, lines: list[str]) -> None:
    leaves: list[tuple[str, Ancestor | None]] = [(f"{name}: {text}", None) for name, text in node.data]
    leaves += [(f"{item.kind}: {item.path or '-'}  {item.sha256[:12]}  {ancestor_state(item)}", item)
               for item in node.inputs]  # fmt: skip
    for index, (text, item) in enumerate(leaves):
        last = index == len(leaves) - 1
        lines.append(f"{indent}{'└─' if last else '├─'} {text}")
        if item:
            _branches(item, indent + ("   " if last else "│  "), lines)


def ancestor_state(node: Ancestor) -> str:
    """Whether an input is still the file that was used."""
    return f"{node.state} now ({node.now[:12]})" if node.now else node.state


def _run(run: RunRecord, alone: bool) -> Iterator[str]:
    yield headline(run)
    if run.shown:
        yield ""
        yield from aligned(facts_rows(run, alone))
        if lines := skip_lines(run):
            yield "\nskipped batches"
            yield from lines
        if rows := validation_rows(run):
            yield "\nvalidation"
            yield from aligned([VALIDATION_HEAD, *rows])
        yield ""
        yield from difference_lines(run)
        yield "\nmade from"
        yield from tree_lines(ancestry(run.shown))
        if not alone and run.checkpoints:
            yield "\ncheckpoints"
            yield from aligned(checkpoint_rows(run))
    yield from problem_lines(Inspection(run.folder, "run", [run]))
    for phase in phases_of(run.metrics):
        curves = [loss_curve(run.metrics, phase, event) for event in ("train", "val")]
        if any(item.steps for item in curves):
            yield ""
            yield text_plot(f"loss, {phase}", curves, columns())
