"""Curves of training, read from ``metrics.jsonl`` also while it is written, for the terminal and for a page.

Needs no torch.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_BYTES = 64 << 20  # of a log: its newest part; about 250,000 lines


@dataclass(frozen=True)
class Curve:
    """One figure over the steps of a phase.

    Attributes:
        label: in the legend.
        steps: where it was measured.
        values: what was measured, finite.
        sparse: measured now and then: shown as points too.
        mark: one letter on the curve where there are no colours; "" is a plain line.
    """

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    sparse: bool = False
    mark: str = ""

    @property
    def legend(self) -> str:
        """What the curve is, after its mark."""
        return f"{self.mark or 'line'}: {self.label}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line that is still being written, or is none of ours, is left out."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) > _MOST_BYTES:
                file.seek(-_MOST_BYTES, os.SEEK_END)
                file.readline()  # the rest of a line whose beginning is not read
            else:
                file.seek(0)
            lines = file.read(_MOST_BYTES).split(b"\n")[:-1]
    except OSError:
        return []
    return [record for record in map(_record, lines) if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    keys = (("phase", str), ("step", int), ("event", str))
    fits = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in keys)
    return found if fits and abs(found["step"]) < 1e15 else None


def loss_curve(metrics: Sequence[dict[str, Any]], phase: str, event: str) -> Curve:
    """The loss of a phase over its steps, in training (``train``) or validation (``val``), without NaN."""
    points = [
        (record["step"], float(record["loss"]))
        for record in metrics
        if (record["phase"], record["event"]) == (phase, event) and is_number(record.get("loss"))
    ]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return Curve(event, steps, values, event == "val", "o" if event == "val" else "")


def is_number(value: Any) -> bool:
    """Whether a plain value can be drawn and compared: no NaN, no Inf, nothing as large as only damage gives."""
    return isinstance(value, int | float) and abs(value) < 1e30  # false for NaN


def phases_of(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """The phases that a log speaks of, in their order."""
    return list(dict.fromkeys(record["phase"] for record in metrics))


def text_plot(title: str, curves: Sequence[Curve], width: int, height: int = 10) -> str:
    """Curves as characters, without colours; they are told apart by their marks.

    Args:
        title: the first line.
        curves: those that have no point are left out.
        width: columns in all.
        height: lines of the curves themselves.
    """
    import plotille

    shown = [item for item in curves if item.steps]
    if not shown:
        return f"{title}: nothing yet"
    figure = plotille.Figure()
    figure.with_colors, figure.origin, figure.x_label, figure.y_label = False, False, "step", ""
    figure.width, figure.height = max(20, width - 14), height
    to_axis, from_axis = (math.log10, lambda y: 10**y) if falls_far(shown) else (float, float)
    heights = [[to_axis(value) for value in item.values] for item in shown]
    low, high = min(map(min, heights)), max(map(max, heights))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    first, last = min(item.steps[0] for item in shown), max(item.steps[-1] for item in shown)
    figure.set_x_limits(min_=min(first, last - 1), max_=last)
    figure.set_y_limits(min_=low - margin, max_=high + margin)
    figure.x_ticks_fkt = lambda value, _: f"{value:.0f}"
    figure.y_ticks_fkt = lambda value, _: f"{from_axis(value):.4g}".rjust(9)
    for item, ys in zip(shown, heights, strict=True):
        if len(item.steps) > 1:
            figure.plot(item.steps, ys)
        every = 1 if item.sparse else max(1, len(item.steps) // 6)
        if item.mark or len(item.steps) == 1:
            figure.scatter(item.steps[::-every], ys[::-every], marker=item.mark or "o")
    legend = ", ".join(item.legend for item in shown)
    # blank braille cells would show as dots in some fonts, and plotille's head line holds no figure
    plot = figure.show().replace("\u2800", " ").split("\n")[1:]
    return "\n".join([f"{title}  ({legend})", *(line.rstrip() for line in plot)])


def falls_far(curves: Sequence[Curve]) -> bool:
    """Whether values reach so far that they are readable on a logarithmic axis alone."""
    values = [value for item in curves for value in item.values]
    return min(values) > 0 and max(values) > 4 * min(values)


def svg_plots(panels: Sequence[tuple[str, Sequence[Curve]]]) -> str:
    """Pictures for a page, one of each ``(title, curves)``, as SVG; those without a point are left out."""
    shown = [(title, [item for item in curves if item.steps]) for title, curves in panels]
    return "\n".join(_svg(title, curves) for title, curves in shown if curves)


def _svg(title: str, curves: Sequence[Curve]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    picture, axis = pyplot.subplots(figsize=(4.2, 2.6))
    for item in curves:
        style = "o-" if item.sparse else "-"
        axis.plot(
            item.steps,
            item.values,
            style,
            label=_plain(item.legend if item.mark.isupper() else item.label),
            markersize=3,
            linewidth=1,
        )
    axis.set_title(_plain(title), fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("loss", fontsize=8)
    if falls_far(curves):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
    buffer = io.StringIO()
    picture.tight_layout()
    picture.savefig(buffer, format="svg")
    pyplot.close(picture)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _plain(text: str) -> str:
    """A name as matplotlib shows it unchanged: dollars would begin a formula, a first underscore hides a label."""
    return text.replace("$", r"\$").lstrip("_")
