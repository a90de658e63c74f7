"""What a run came to, for the terminal and as one HTML file that needs nothing outside of itself. Needs no torch."""

from __future__ import annotations

import html
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni.atomic import write_whole
from omni.command_line import as_words
from omni.config import UserError
from omni.curves import loss_curve, phases_of, read_metrics, svg_plots
from omni.page import page, sample_sections, table
from omni.predictions import Sets
from omni.sample import Sample
from omni.stages import STAGES, StageInfo, read_raw_config
from omni.summary import read_summary

Figures = dict[str, dict[str, Any]]  # by stage and name, as `omni eval --json` writes them

# What each figure is held against: other figures of its stage, or what guessing gives.
_BESIDE: dict[str, tuple[str, ...]] = {
    "thinker.bits_per_byte": ("bits_per_byte_5gram",),
    "audio_enc.wer": ("wer_unseen_voices",),
    "vision.image_to_text_r1": ("chance 0.01",),
    "vision.text_to_image_r1": ("chance 0.01",),
    "vision.caption_swap": ("chance 0.5",),
    "codec.cer_resynthesis": ("cer_vocoder", "cer_recordings"),
    "codec.cer_vocoder": ("cer_recordings",),
    "talker.cer": ("cer_recordings",),
    "talker.cer_judge": ("cer_recordings_judge",),
    "talker.cer_unseen_words": ("cer_recordings_unseen_words",),
    "talker.cer_unseen_words_judge": ("cer_recordings_unseen_words_judge",),
    "talker.cer_unseen_voices": ("cer_recordings_unseen_voices",),
    "talker.cer_unseen_voices_judge": ("cer_recordings_unseen_voices_judge",),
    "talker.cer_shuffled": ("cer_recordings_shuffled",),
    "talker.repeats": ("repeats_recordings",),
    "talker.skips": ("skips_recordings",),
    "talker.speaker_nearer": ("chance 0.5",),
    "omni.image_qa": ("image_qa_blind", "image_qa_prior"),
    "omni.speech_qa": ("speech_qa_deaf", "speech_qa_prior"),
    "omni.image_qa_unseen_combinations": ("image_qa",),
}


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
    rows = _set_rows(sets)
    return ["test sets", *(f"  {path}  sha256 {digest}, with {files} files" for path, files, digest in rows)]


def _set_rows(sets: Sets) -> list[tuple[str, str, str]]:
    return [(path, f"{row['media']:,}", str(row["sha256"])) for path, row in sets.items()]


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
    names = ("micro-omni", "torch", "torchaudio", "torchvision", "numpy", "jiwer")
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if _installed(name))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{_processor()}, {cores} cores, {platform.system()}"
    return f"{system} | Python {platform.python_version()}, {packages}"


def _installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Told:
    """What a report tells beside what the checkpoints say of themselves.

    Attributes:
        figures: as ``omni eval --json`` writes them.
        sets: the test sets behind them.
        samples: what each stage does, by the kind of its checkpoint.
        seconds: how long each step took.
        wall_seconds: how long all of them took, some of them side by side.
    """

    figures: Figures
    sets: Sets
    samples: Mapping[str, Sequence[Sample]]
    seconds: Mapping[str, float]
    wall_seconds: float


def write_report(path: Path, size: str, told: Told) -> None:
    """Write the HTML file of a run of the configurations of a size."""
    records = stage_records(size)
    whole = f"{told.wall_seconds / 60:.0f} minutes in all" if told.seconds else ""
    head = [f"<h1>μOmni, size {html.escape(size)}</h1>", f"<p>{time.strftime('%Y-%m-%d %H:%M')}, {whole}</p>", _NAV]
    parts = [
        *_section("figures", "In short: held-out figures beside what they are held against"),
        _beside_table(told.figures),
        *_forgetting(told.figures, records),
        *_section("samples", "To see and hear: held-out data, nothing chosen by hand"),
        *_samples(told.samples),
        *_section("training", "What was trained, and how long"),
        _training_table(records, told.seconds),
        *[_curves(record) for record in records],
        *_section("data", "On what"),
        _data_table(records),
        "<h3>Test sets</h3>",
        table(("set", "recordings or pictures", "sha256"), _set_rows(told.sets)),
        *_section("all", "All figures, with 95 % intervals over the test cases"),
        table(("stage", "figure", "value", "95 % interval", "n"), table_rows(told.figures)),
        *_section("again", "How to make it again"),
        *_reproduce(size, records),
    ]
    write_whole(path, page(f"μOmni {size}", [*head, *parts]).encode())


_NAV = (
    '<nav><a href="#figures">figures</a><a href="#before">before and after</a><a href="#samples">samples</a>'
    '<a href="#training">training</a>'
    '<a href="#data">data</a><a href="#all">all figures</a><a href="#again">make it again</a></nav>'
)


def _section(anchor: str, title: str) -> tuple[str]:
    return (f'<h2 id="{anchor}">{html.escape(title)}</h2>',)


def _beside_table(figures: Figures) -> str:
    """The figures that there is something to hold against."""
    rows = []
    for key, others in _BESIDE.items():
        stage, _, name = key.partition(".")
        found = figures.get(stage, {})
        if name in found:
            beside = [f"{other} {_valued(found[other])}" for other in others if other in found]
            beside += [other for other in others if other.startswith("chance")]
            rows.append((stage, name, _valued(found[name]), "; ".join(beside)))
    return table(("stage", "figure", "value [95 % interval]", "beside"), rows)


# Skill, who has it before stage E, its figure then, and the figure of the whole model; None: the very same weights
_BEFORE_AND_AFTER = (
    ("written text, bits per byte", "A", "thinker.bits_per_byte", "omni.bits_per_byte"),
    ("written questions", "A", "omni.text_qa_before", "omni.text_qa"),
    ("transcripts of the same recordings, word error rate", "B", "omni.asr_wer_ctc", "omni.asr_wer"),
    ("hearing, word error rate", "B", "audio_enc.wer", None),
    ("seeing, recall@1", "C", "vision.image_to_text_r1", None),
    ("speaking, character error rate", "D", "talker.cer", None),
)


def _forgetting(figures: Figures, records: Sequence[StageRecord]) -> list[str]:
    """The section, where there is a stage E."""
    found = [record.summary for record in records if record.stage.kind == "omni"]
    title = "What stage E forgot, or taught: the skills of the stages before it"
    return [*_section("before", title), _forgetting_table(figures, found[0])] if found else []


def _forgetting_table(figures: Figures, summary: Mapping[str, Any]) -> str:
    """Each earlier stage's skill before and after stage E, whose summary is given.

    Of parts that it trained along without measuring them, nothing is claimed.
    """

    def find(key: str | None) -> dict[str, Any] | None:
        stage, _, name = (key or "").partition(".")
        return figures.get(stage, {}).get(name)

    trained = set[str]()
    if not summary["config"].get("freeze_encoders", True):
        trained |= {"C"} if summary["config"].get("with_words") else {"B", "C"}
    if summary["model_config"]["speech"]["talker"]["state_dim"]:  # then the Talker follows the new Thinker
        trained |= {"D"}
    rows = []
    for skill, letter, before, after in _BEFORE_AND_AFTER:
        found, then = find(before), find(after)
        if found and (then or after is None):
            same = "trained on: not measured" if letter in trained else "the same weights"
            rows.append((letter, skill, _valued(found), _valued(then) if then else same))
    return table(("stage", "skill", "before stage E", "after"), rows)


def _valued(figure: dict[str, Any]) -> str:
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


def _samples(samples: Mapping[str, Sequence[Sample]]) -> list[str]:
    parts = []
    for stage in reversed(STAGES):  # the whole model first
        if found := samples.get(stage.kind):
            parts += [f"<h3>{stage.letter}. {html.escape(stage.title)}</h3>", sample_sections(found)]
    return parts


def _training_table(records: Sequence[StageRecord], seconds: Mapping[str, float]) -> str:
    rows, parts = [], list[str]()
    for record in records:
        summary = record.summary
        sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in summary["parameters"].items())
        parts.append(f"{record.stage.letter}: {sizes}")
        millions = sum(summary["parameters"].values()) / 1e6
        seen = ", ".join(f"{unit.partition('.')[2]} {count:,}" for unit, count in summary["seen"].items())
        wall = seconds.get(record.stage.prefix)
        rows.append((
            f"{record.stage.letter} {record.stage.title}", f"{millions:.1f} M", f"{summary['total_step']:,}", seen,
            str(summary["skipped"]), f"{summary['seconds']:.0f} s", f"{wall:.0f} s" if wall else "-",
            summary["precision"],
        ))  # fmt: skip
    others = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name in _OTHER_STEPS)
    head = ("stage", "parameters", "steps", "seen", "skipped", "in steps", "in all", "precision")
    return table(head, rows) + f"<p>{html.escape(others)}</p><p>{'<br>'.join(map(html.escape, parts))}</p>"


_OTHER_STEPS = ("data", "evaluation", "samples")


def _data_table(records: Sequence[StageRecord]) -> str:
    """What each stage read, as its checkpoint recorded it."""
    rows = []
    for record in records:
        config, found = record.summary["config"]["data"], record.summary["lineage"].get("data")
        for part, told in (found or {}).items():
            path = config.get(part)
            megabytes = f"{told['media_bytes'] / 1e6:.1f}" if told["media"] else "-"
            rows.append((record.stage.letter, part, str(path or "-"), f"{told['media']:,}", megabytes, told["sha256"]))
    return table(("stage", "part", "file", "recordings or pictures", "MB of them", "sha256"), rows)


def _curves(record: StageRecord) -> str:
    """Training and validation loss of every phase of a stage, as an SVG in the page."""
    return svg_plots([
        (f"{record.stage.letter}: {phase}", [loss_curve(record.metrics, phase, event) for event in ("train", "val")])
        for phase in phases_of(record.metrics)
    ])  # fmt: skip


def _command(size: str, record: StageRecord) -> str:
    """What to type to train a stage as it was, changes to the shipped configuration included."""
    command = record.stage.command(size)
    try:
        shipped = read_raw_config(record.stage.config_path(size))
    except UserError:
        return command
    words = as_words(record.summary["config"], shipped, record.summary.get("changed") or ())
    return f"{command} {words}".rstrip()


def _reproduce(size: str, records: Sequence[StageRecord]) -> list[str]:
    """Code, commands, configurations and checksums."""
    parts = [f"<p>On {html.escape(machine())}.</p><p>All of it: <code>omni run --size {html.escape(size)}</code>. "
             "Stage by stage:</p>"]  # fmt: skip
    rows = []
    for record in records:
        code, config = record.summary["code"], record.summary["config"]
        seed = config["run"]["seed"] if isinstance(config.get("run"), dict) else "-"
        rows.append((record.stage.letter, str(seed), str(code.get("commit") or "-"), str(code.get("source") or "-"),
                     record.summary["sha256"][:16]))  # fmt: skip
    commands = "\n".join(_command(size, record) for record in records)
    parts.append(f"<pre>{html.escape(commands)}</pre>")
    parts.append(table(("stage", "seed", "commit", "source", "checkpoint"), rows))
    for record in records:
        text = json.dumps(record.summary["config"], indent=1, ensure_ascii=False)
        title = html.escape(f"{record.stage.letter}: the whole configuration, every key")
        parts.append(f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>")
    return parts
