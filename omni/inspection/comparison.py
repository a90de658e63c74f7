"""What differs between runs: configuration and origin, curves, figures, and whether that is more than chance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omni.command_line import flat
from omni.config import UserError
from omni.curves import Curve, is_number, loss_curve, phases_of
from omni.inspection.chance import (
    SEED_SPREAD,
    Difference,
    Scores,
    curve_difference,
    figure_difference,
    judged,
    paired_difference,
)
from omni.inspection.runs import RunRecord, inspect
from omni.predictions import predictions_beside, read_predictions
from omni.stages import STAGES, read_raw_config
from omni.summary import fingerprint

# of a configuration: where a run stands and how often it speaks, which is no difference of what it learns
_PLACE = ("name", "run.save_dir", "run.print_freq", "run.val_freq", "run.checkpoint_freq", "run.keep_last",
          "run.tensorboard", "run.wandb", "run.detect_anomaly", "run.num_workers", "run.num_threads")  # fmt: skip
_SEED = "run.seed"


@dataclass
class Contestant:
    """One of the runs that are compared.

    Attributes:
        letter: by which tables and curves name it.
        path: as it was given.
        runs: by the kind of checkpoint: one of a ``save_dir``, up to five of a ``runs/<size>``.
        figures: of ``omni eval``, by ``stage.name``; those of several codebooks by ``stage.name[1]``.
        notes: what a reader of its figures must know.
        scores: what each case counts for in a figure, where the predictions were kept.
    """

    letter: str
    path: Path
    runs: dict[str, RunRecord] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A figure or a curve of two runs.

    Attributes:
        name: ``talker.cer``, or ``thinker, train: training loss``.
        first: letters of the runs on the one side; several where they differ by their seed alone.
        second: of those on the other.
        values: what is compared, as text, of both.
        seed_alone: both sides are one recipe.
    """

    name: str
    first: str
    second: str
    values: tuple[str, str]
    difference: Difference
    seed_alone: bool = False


@dataclass
class Comparison:
    """Everything that `omni compare` says; ``settings`` has one ``(key, value of each run)`` for what differs."""

    contestants: list[Contestant]
    settings: list[tuple[str, list[Any]]]
    curves: dict[str, list[Curve]]
    verdicts: list[Verdict]


def compare(paths: Sequence[Path]) -> Comparison:
    """Hold runs against the first of them.

    Raises:
        UserError: for fewer than two, and for a path that is no run.
    """
    if len(paths) < 2:
        raise UserError(f"omni compare: found {len(paths)} runs, expected at least two", exit_code=2)
    contestants = [_contestant(path, chr(ord("A") + index % 26)) for index, path in enumerate(paths)]
    curves, verdicts = _curves(contestants)
    verdicts += _figures(contestants)
    found = judged([item.difference for item in verdicts])
    verdicts = [Verdict(**{**vars(item), "difference": new}) for item, new in zip(verdicts, found, strict=True)]
    return Comparison(contestants, _settings(contestants), curves, verdicts)


# ---- reading ----


def _contestant(path: Path, letter: str) -> Contestant:
    found = Contestant(letter, path)
    if path.is_file() and path.suffix == ".json":
        _add_figures(found, path)
    elif (path / "eval.json").is_file():
        _add_figures(found, path / "eval.json")
        _add_stages(found)
    else:
        inspection = inspect(path)
        if inspection.what == "folder":
            raise UserError(
                f"{path}: found a folder of {len(inspection.runs)} runs, expected one: a save_dir such as "
                f"{inspection.runs[0].folder}, or what `omni run` leaves in runs/<size>"
            )
        run = inspection.runs[0]
        found.runs[kind_of(run)] = run
    return found


def _add_figures(found: Contestant, path: Path) -> None:
    """The figures of a file, and the predictions beside it as far as they are those of the figures."""
    found.figures = _read_figures(path)
    beside = predictions_beside(path)
    if not beside.is_file():
        return
    for name, scores in read_predictions(beside).scores().items():
        total = sum(whole for _, whole in scores.values())
        value = sum(part for part, _ in scores.values()) / total if total else math.nan
        if name in found.figures and math.isclose(value, found.figures[name]["value"], rel_tol=1e-4, abs_tol=1e-5):
            found.scores[name] = scores
    if not found.scores:
        found.notes.append(f"{beside.name} holds predictions of another evaluation")


def _read_figures(path: Path) -> dict[str, dict[str, Any]]:
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
        found = {f"{stage}.{name}": figure for stage, named in stages.items() for name, figure in named.items()}
        single = {key: part for key, figure in found.items() for key, part in _each(key, figure)}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: found no figures ({type(error).__name__}: {error}), expected what `omni eval --json FILE` writes"
        ) from None
    return single


def _each(key: str, figure: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A figure, or those of its codebooks."""
    if not isinstance(figure["value"], list):
        return [(key, {name: figure[name] for name in ("value", "n", "low", "high")})]
    parts = zip(figure["value"], figure["low"], figure["high"], strict=True)
    return [
        (f"{key}[{index}]", {"value": value, "n": figure["n"], "low": low, "high": high})
        for index, (value, low, high) in enumerate(parts, 1)
    ]


def _add_stages(found: Contestant) -> None:
    """The runs behind the figures of a ``runs/<size>``, as far as they are here, and whether they are still those."""
    made_from: dict[str, Any] = {}
    try:
        made_from = json.loads((found.path / "state.json").read_text(encoding="utf-8"))["evaluation"]["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        found.notes.append("does not say which checkpoints were evaluated")
    for stage in STAGES:
        try:
            path = stage.checkpoint(found.path.absolute().name)
            found.runs[stage.kind] = inspect(path.parent).runs[0]
            if made_from and made_from.get(stage.kind) != fingerprint(path):
                found.notes.append(f"was evaluated before {path} became what it is now")
        except (UserError, OSError):
            continue


def kind_of(run: RunRecord) -> str:
    """The kind of a run's checkpoints; of one that has none yet by its configuration's name."""
    if run.shown:
        return run.shown.facts.kind
    name = str(_config(run).get("name"))
    return next((stage.kind for stage in STAGES if name.startswith(f"{stage.prefix}_")), "run")


def _config(run: RunRecord) -> dict[str, Any]:
    if run.shown:
        return run.shown.facts.config
    try:
        return read_raw_config(run.folder / "config.json")
    except UserError:
        return {}


# ---- configuration ----


def _described(run: RunRecord) -> dict[str, Any]:
    """Everything that a run was made from, by dotted keys."""
    facts = run.shown.facts if run.shown else None
    values = dict(flat(_config(run)))
    if facts:
        values |= {f"made from: {key}": item for key, item in flat(facts.lineage)}
        values |= {f"code: {key}": facts.code.get(key) for key in ("commit", "source")}
    return values


def _settings(contestants: Sequence[Contestant]) -> list[tuple[str, list[Any]]]:
    """``(key, values)`` of what is not the same in all runs of one kind."""
    kinds = list(dict.fromkeys(kind for item in contestants for kind in item.runs))
    rows = []
    for kind in kinds:
        described = [_described(item.runs[kind]) if kind in item.runs else None for item in contestants]
        there = [item for item in described if item is not None]
        for key in dict.fromkeys(key for item in there for key in item):
            values = [item.get(key) for item in there]
            if key not in ("name", "run.save_dir") and any(value != values[0] for value in values):
                name = f"{kind}: {key}" if len(kinds) > 1 else key
                rows.append((name, [None if item is None else item.get(key) for item in described]))
    return rows


def recipe(run: RunRecord) -> str:
    """What two runs have in common that differ by their seed alone."""
    values = {key: item for key, item in _described(run).items() if key not in (*_PLACE, _SEED)}
    return json.dumps({key: item for key, item in values.items() if not key.startswith("code: commit")}, sort_keys=True)


# ---- curves and figures ----


def _curves(contestants: Sequence[Contestant]) -> tuple[dict[str, list[Curve]], list[Verdict]]:
    """The loss curves over one another by title, and what differs between them."""
    shown: dict[str, list[Curve]] = {}
    verdicts = []
    kinds = list(dict.fromkeys(kind for item in contestants for kind in item.runs))
    for kind in kinds:
        runs = [(item, item.runs[kind]) for item in contestants if kind in item.runs]
        for phase in dict.fromkeys(phase for _, run in runs for phase in phases_of(run.metrics)):
            for event, words in (("train", "training loss"), ("val", "validation loss")):
                found = [(item, run, _curve(item, run, phase, event)) for item, run in runs]
                found = [entry for entry in found if entry[2].steps]
                if found:
                    title = f"{kind}, {phase}: {words}"
                    shown[title] = [entry[2] for entry in found]
                    verdicts += _curve_verdicts(title, found, SEED_SPREAD[event])
    return shown, verdicts


def _curve(item: Contestant, run: RunRecord, phase: str, event: str) -> Curve:
    return replace(loss_curve(run.metrics, phase, event), label=str(item.path), mark=item.letter)


def _curve_verdicts(title: str, found: Sequence[tuple[Contestant, RunRecord, Curve]], spread: float) -> list[Verdict]:
    """The first run's recipe against every other one, and against its own other seeds one by one."""
    groups: dict[str, list[tuple[Contestant, Curve]]] = {}
    for item, run, line in found:
        groups.setdefault(recipe(run), []).append((item, line))
    first, *others = groups.values()
    verdicts = []
    for group in others:
        rest = [[line for _, line in other] for other in others if other is not group]
        verdicts.append(_curve_verdict(title, first, group, spread, rest))
    for one in first[1:]:
        rest = [[line for _, line in other] for other in others]
        verdicts.append(_curve_verdict(title, first[:1], [one], spread, rest, seed_alone=True))
    return verdicts


def _curve_verdict(
    title: str,
    first: Sequence[tuple[Contestant, Curve]],
    second: Sequence[tuple[Contestant, Curve]],
    spread: float,
    rest: Sequence[Sequence[Curve]],
    seed_alone: bool = False,
) -> Verdict:
    sides = [[line for _, line in side] for side in (first, second)]
    letters = ["".join(item.letter for item, _ in side) for side in (first, second)]
    ends = [" ".join(f"{line.values[-1]:.4g}" for line in side) for side in sides]
    difference = curve_difference(sides[0], sides[1], spread, rest)
    return Verdict(title, letters[0], letters[1], (ends[0], ends[1]), difference, seed_alone)


def _figures(contestants: Sequence[Contestant]) -> list[Verdict]:
    """Every figure of the first run that another has as well."""
    first, *others = contestants
    verdicts = []
    for name, figure in first.figures.items():
        for item in others:
            if name in item.figures:
                values = (_shown(figure), _shown(item.figures[name]))
                pair = [run.scores[name] for run in (first, item) if name in run.scores]
                difference = paired_difference(*pair) if len(pair) == 2 else None
                difference = difference or figure_difference(figure, item.figures[name])
                verdicts.append(Verdict(name, first.letter, item.letter, values, difference))
    return verdicts


def _shown(figure: dict[str, Any]) -> str:
    value, low, high = (figure[key] if is_number(figure[key]) else None for key in ("value", "low", "high"))
    number = "-" if value is None else f"{value:.4g}"
    return number if low is None or high is None else f"{number} [{low:.4g}, {high:.4g}]"
