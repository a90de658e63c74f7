"""What `omni inspect` found, as one page that needs nothing outside of itself."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Iterator, Sequence

from omni.curves import loss_curve, phases_of, svg_plots
from omni.inspection.ancestry import ancestry
from omni.inspection.runs import Inspection, RunRecord
from omni.inspection.text import (
    FOLDER_HEAD,
    VALIDATION_HEAD,
    checkpoint_rows,
    difference_lines,
    facts_rows,
    family_trees,
    folder_rows,
    headline,
    problem_lines,
    skip_lines,
    tree_lines,
    validation_rows,
)
from omni.page import page, table


def inspection_page(found: Inspection, more: Sequence[str] = ()) -> str:
    """An :class:`Inspection` as a page; ``more`` are pieces of HTML that follow."""
    parts = [f"<h1>{_text(found.path)}</h1>", f"<p>as of {time.strftime('%Y-%m-%d %H:%M:%S')}</p>"]
    if found.what == "folder":
        parts += [table(FOLDER_HEAD, folder_rows(found)), _lines(problem_lines(found), "problem")]
        trees = [line for tree in family_trees(found) for line in tree_lines(tree)]
        parts += [f"<h2>Made from</h2>{_lines(trees)}"] if trees else []
    for run in found.runs:
        parts += _run(run, found.what == "checkpoint")
        if found.what == "run":
            parts.append(_lines(problem_lines(found), "problem"))
    return page(f"μOmni: {found.path}", [*parts, *more])


def _run(run: RunRecord, alone: bool) -> Iterator[str]:
    yield f"<h2>{_text(headline(run))}</h2>"
    yield svg_plots([
        (f"loss, {phase}", [loss_curve(run.metrics, phase, event) for event in ("train", "val")])
        for phase in phases_of(run.metrics)
    ])  # fmt: skip
    if run.shown is None:
        return
    yield table(("", ""), facts_rows(run, alone))
    if rows := validation_rows(run):
        yield "<h3>Validation</h3>" + table(VALIDATION_HEAD, rows)
    if lines := skip_lines(run):
        yield "<h3>Skipped batches</h3>" + _lines(lines)
    yield "<h3>Configuration and origin</h3>" + _lines([*difference_lines(run), "", *tree_lines(ancestry(run.shown))])
    if not alone:
        yield "<h3>Checkpoints</h3>" + table(("file", "at", "size", "sha256", "resume"), checkpoint_rows(run))


def _lines(lines: Iterable[str], css: str = "") -> str:
    text = "\n".join(lines).strip("\n")
    return f'<pre class="{css}">{_text(text)}</pre>' if text else ""


def _text(text: object) -> str:
    return html.escape(str(text))
