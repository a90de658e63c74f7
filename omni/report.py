"""What a run came to, for the terminal and as one HTML file that needs nothing outside of itself. Needs no torch."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni.curves import loss_curve, phases_of, read_metrics, svg_plots
from omni.exchange import Exchange
from omni.page import page, table
from omni.predictions import Sets
from omni.stages import STAGES, StageInfo
from omni.summary import read_summary

Figures = dict[str, dict[str, Any]]  # by stage and name, as `omni eval --json` writes them

# What each figure is held against, beside it in the table.
_BESIDE = {
    "thinker.bits_per_byte": "bits_per_byte_5gram",
    "codec.cer_resynthesis": "cer_recordings",
    "codec.cer_vocoder": "cer_recordings",
    "talker.cer": "cer_recordings",
    "talker.cer_judge": "cer_recordings_judge",
    "talker.cer_unseen_words": "cer_recordings_unseen_words",
    "talker.cer_unseen_words_judge": "cer_recordings_unseen_words_judge",
    "talker.cer_unseen_voices": "cer_recordings_unseen_voices",
    "talker.cer_unseen_voices_judge": "cer_recordings_unseen_voices_judge",
    "omni.image_qa": "image_qa_blind",
    "omni.speech_qa": "speech_qa_deaf",
}
_LARGEST_MEDIA = 400_000  # bytes of one embedded file; a longer recording is left out of the report, not of its folder


def number(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, list):
        return " ".join(number(item) for item in value)
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"


def table_rows(figures: Figures) -> list[tuple[str, str, str, str, str]]:
    """(stage, figure, value, 95 % interval, number of cases) of every figure."""
    rows = []
    for stage, found in figures.items():
        for name, figure in found.items():
            low, high = figure["low"], figure["high"]
            spans = zip(low, high, strict=True) if isinstance(low, list) else [(low, high)]
            interval = " ".join(f"[{number(a)}, {number(b)}]" for a, b in spans)
            rows.append((stage, name, number(figure["value"]), interval, str(figure["n"])))
    return rows


def results_table(figures: Figures) -> str:
    """All figures as lines of text."""
    head = ("stage", "figure", "value", "95 % interval", "n")
    rows = [head, *table_rows(figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def sets_lines(sets: Sets) -> list[str]:
    """The test sets behind figures, with their checksums, as lines of text."""
    return ["test sets", *(f"  {path}  sha256 {row['sha256']}, {row['media']} files" for path, row in sets.items())]


@dataclass(frozen=True)
class StageRecord:
    """What one stage left behind."""

    stage: StageInfo
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]


def stage_records(size: str) -> list[StageRecord]:
    """The finished stages of a size."""
    found = []
    for stage in STAGES:
        path = stage.checkpoint(size)
        if path.exists():
            found.append(StageRecord(stage, read_summary(path), read_metrics(path.parent / "metrics.jsonl")))
    return found


def machine() -> str:
    """The machine and the versions that made the figures."""
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchaudio", "torchvision")
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores, {platform.system()} | Python {platform.python_version()}, {packages}"


def write_report(
    path: Path, size: str, figures: Figures, exchanges: Sequence[Exchange], seconds: dict[str, float]
) -> None:
    """Write the HTML file of a run.

    Args:
        path: where to.
        size: of the configurations.
        figures: as ``omni eval --json`` writes them.
        exchanges: example questions with the model's answers.
        seconds: how long each step took.
    """
    records = stage_records(size)
    parts = [
        f"<h1>μOmni, size {html.escape(size)}</h1>",
        f"<p>{html.escape(machine())} | {time.strftime('%Y-%m-%d %H:%M')}</p>",
        f"<p>Made by <code>omni run --size {html.escape(size)}</code>.</p>",
        "<h2>Examples</h2>",
        *[_exchange(exchange) for exchange in exchanges],
        "<h2>Figures on held-out data</h2>",
        _figures_table(figures),
        "<h2>Training</h2>",
        _training_table(records, seconds),
        *[_curves(record) for record in records],
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(page("μOmni", parts), encoding="utf-8")
    temporary.replace(path)


def _figures_table(figures: Figures) -> str:
    rows = []
    for stage, name, value, interval, n in table_rows(figures):
        other = _BESIDE.get(f"{stage}.{name}")
        beside = f"{other} {number(figures[stage][other]['value'])}" if other and other in figures[stage] else ""
        rows.append((stage, name, value, interval, n, beside))
    return table(("stage", "figure", "value", "95 % interval", "n", "beside"), rows)


def _training_table(records: Sequence[StageRecord], seconds: dict[str, float]) -> str:
    rows = []
    for record in records:
        summary = record.summary
        millions = sum(summary["parameters"].values()) / 1e6
        seen = ", ".join(f"{unit.partition('.')[2]} {count:,}" for unit, count in summary["seen"].items())
        wall = seconds.get(record.stage.prefix)
        rows.append((
            f"{record.stage.letter} {record.stage.title}", f"{millions:.1f} M", f"{summary['total_step']:,}", seen,
            str(summary["skipped"]), f"{summary['seconds']:.0f} s", f"{wall:.0f} s" if wall else "-",
            summary["sha256"][:12],
        ))  # fmt: skip
    others = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name in ("data", "evaluation"))
    head = ("stage", "parameters", "steps", "seen", "skipped", "in steps", "in all", "checkpoint")
    return table(head, rows) + f"<p>{html.escape(others)}</p>"


def _curves(record: StageRecord) -> str:
    """Training and validation loss of every phase of a stage, as an SVG in the page."""
    return svg_plots([
        (f"{record.stage.letter}: {phase}", [loss_curve(record.metrics, phase, event) for event in ("train", "val")])
        for phase in phases_of(record.metrics)
    ])  # fmt: skip


def _exchange(exchange: Exchange) -> str:
    parts = [f"<h3>{html.escape(exchange.kind)}</h3><p>{html.escape(exchange.question)}</p>"]
    if exchange.image:
        source = _embedded(exchange.image, "image/png")
        parts.append(f'<img alt="the picture" src="{source}">' if source else "")
    if exchange.audio:
        parts.append(_audio(exchange.audio))
    right = "right" if exchange.answer.strip().lower() == exchange.expected.strip().lower() else "other"
    answer, expected = html.escape(exchange.answer), html.escape(exchange.expected)
    parts.append(f'<p class="{right}">answer: <b>{answer}</b> (expected: {expected})</p>')
    if exchange.answer_wav:
        parts.append(_audio(exchange.answer_wav))
    return f"<section>{''.join(parts)}</section>"


def _audio(path: Path) -> str:
    source = _embedded(path, "audio/flac" if path.suffix == ".flac" else "audio/wav")
    return f'<p><audio controls src="{source}"></audio></p>' if source else f"<p>{html.escape(str(path))}</p>"


def _embedded(path: Path, kind: str) -> str | None:
    """A file as a data address; None where it is missing or too large."""
    if not path.is_file() or path.stat().st_size > _LARGEST_MEDIA:
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
