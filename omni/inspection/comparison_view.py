"""What `omni compare` found, for a terminal, as a page and as plain values."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from typing import Any

from omni.config import short_json
from omni.curves import svg_plots, text_plot
from omni.inspection.chance import SEED_SPREAD
from omni.inspection.comparison import Comparison, Verdict
from omni.inspection.facts import value
from omni.inspection.plain import without_nan
from omni.inspection.runs import validations
from omni.inspection.text import aligned, columns, headline, printable
from omni.page import page, table

VERDICT_HEAD = ("what", "verdict", "runs", "first", "second", "difference", "95 % interval", "p")


def comparison_text(found: Comparison) -> str:
    """A :class:`Comparison` as lines."""
    return printable("\n".join(_lines(found)))


def _lines(found: Comparison) -> Iterator[str]:
    yield from _who(found)
    yield ""
    yield from _settings_text(found)
    for title, curves in found.curves.items():
        yield ""
        yield text_plot(title, curves, columns())
    if rows := validation_rows(found):
        yield "\nlast validation"
        yield from aligned(rows)
    if found.verdicts:
        yield "\ndifferences"
        yield from aligned([VERDICT_HEAD, *map(verdict_row, found.verdicts)])
        yield f"\n{summary(found)}"
    else:
        yield "\nnothing that all of them have can be compared"


def _who(found: Comparison) -> Iterator[str]:
    for item in found.contestants:
        yield f"{item.letter}: {item.path}"
        yield from (f"   {headline(run)}" for run in item.runs.values())
        yield from (f"   note: {note}" for note in item.notes)


def settings_rows(found: Comparison) -> list[tuple[str, ...]]:
    """What differs in configuration and origin, one column a run."""
    head = ("key", *(item.letter for item in found.contestants))
    return [head, *((key, *map(short_json, values)) for key, values in found.settings)]


def _settings_text(found: Comparison) -> list[str]:
    if not found.settings:
        return ["configuration, data and code: the same" if any(item.runs for item in found.contestants) else ""]
    return ["configuration, data and code: differ in", *aligned(settings_rows(found))]


def validation_rows(found: Comparison) -> list[tuple[str, ...]]:
    """The last validation of every phase, one column a run; its figures have no interval."""
    cells: dict[str, dict[str, str]] = {}
    for item in found.contestants:
        for kind, run in item.runs.items():
            for last in validations(run):
                for name, number in last.last.items():
                    cells.setdefault(f"{kind}, {last.phase}: {name}", {})[item.letter] = value(number)
    letters = [item.letter for item in found.contestants]
    rows = [(name, *(row.get(letter, "-") for letter in letters)) for name, row in cells.items()]
    return [("figure", *letters), *rows] if rows else []


def verdict_row(item: Verdict) -> tuple[str, ...]:
    """One row of what differs; see ``VERDICT_HEAD``."""
    found = item.difference
    percent = 100 if "loss" in item.name.rpartition(": ")[2] and ": " in item.name else 1
    unit = " %" if percent == 100 else ""
    interval = f"{percent * found.low:+.3g} to {percent * found.high:+.3g}{unit}"
    known = found.p == found.p
    how = (" (seeds)" if item.seed_alone else "") + (" (paired)" if found.paired else "")
    return (
        item.name, found.verdict + how, f"{item.first} {item.second}", *item.values,
        f"{percent * found.value:+.3g}{unit}" if known else "-", interval if known else "-",
        f"{found.p:.2g}" if known else "-",
    )  # fmt: skip


def summary(found: Comparison) -> str:
    """How many differ, and what that rests on."""
    larger = sum(item.difference.larger for item in found.verdicts)
    lines = [f"{larger} of {len(found.verdicts)} differences are larger than chance, all of them looked at together."]
    if any(item.name in found.curves for item in found.verdicts):
        if max(len(item.first) + len(item.second) for item in found.verdicts) == 2:
            val, train = (f"{100 * SEED_SPREAD[event]:.0f} %" for event in ("val", "train"))
            lines.append(
                f"One run a recipe: seeds are assumed to differ by {val} in validation loss and {train} in training "
                "loss. Give runs of other seeds to measure it."
            )
        else:
            lines.append("Runs that differ by their seed alone are one recipe: they say how far seeds lie apart.")
    if any(item.name not in found.curves for item in found.verdicts):
        lines.append("Intervals of figures are over test cases, not over seeds: they compare these checkpoints.")
        paired = sum(item.difference.paired for item in found.verdicts)
        lines.append(
            f"{paired} figures were compared case by case."
            if paired
            else "No predictions were found beside both, so no figure was compared case by case."
        )
    return "\n".join(lines)


def comparison_page(found: Comparison) -> str:
    """A :class:`Comparison` as a page."""
    head, *rows = settings_rows(found)
    parts = ["<h1>Comparison</h1>", f"<pre>{html.escape(chr(10).join(_who(found)))}</pre>"]
    if found.verdicts:
        parts.append(f"<h2>Differences</h2><p>{html.escape(summary(found)).replace(chr(10), '<br>')}</p>")
        parts.append(table(VERDICT_HEAD, [verdict_row(item) for item in found.verdicts]))
    parts.append("<h2>Curves</h2>" + svg_plots(list(found.curves.items())) if found.curves else "")
    parts.append("<h2>Configuration, data and code</h2>" + (table(head, rows) if rows else "<p>The same.</p>"))
    if figures := validation_rows(found):
        parts.append("<h2>Last validation</h2>" + table(figures[0], figures[1:]))
    return page("μOmni: comparison", parts)


def comparison_values(found: Comparison) -> dict[str, Any]:
    """A :class:`Comparison` as one object that JSON can hold."""
    return dict(
        without_nan({
            "runs": [
                {"letter": item.letter, "path": str(item.path), "notes": item.notes, "figures": item.figures,
                 "states": {kind: run.state for kind, run in item.runs.items()}}
                for item in found.contestants
            ],
            "settings": [{"key": key, "values": values} for key, values in found.settings],
            "curves": {
                title: {item.mark: list(zip(item.steps, item.values, strict=True)) for item in curves}
                for title, curves in found.curves.items()
            },
            "differences": [
                {**dataclasses.asdict(item), "verdict": item.difference.verdict} for item in found.verdicts
            ],
        })
    )  # fmt: skip
