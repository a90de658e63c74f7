"""Figures with their uncertainty: rates, error rates of recognized speech, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jiwer
import numpy as np

from omni.tokenizer import spoken_text


@dataclass(frozen=True)
class Case:
    """What a model did with one case of a test set.

    Attributes:
        said: the raw prediction and what it is held against, as plain values.
        part: what it adds above the line of a figure that is a ratio of sums; None where a figure is none.
        whole: what it adds below the line.
        where: ``file:line`` of the case.
    """

    said: Mapping[str, Any]
    part: float | None = None
    whole: float = 1.0
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``omni eval --predictions`` writes them."""
        ratio = {} if self.part is None else {"part": self.part, "whole": self.whole}
        return {"case": self.where, **ratio, **self.said}


@dataclass(frozen=True)
class Figure:
    """A measured value with the number of cases behind it and a 95 % bootstrap interval over those cases."""

    value: float
    n: int
    low: float
    high: float
    cases: tuple[Case, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The figure as ``omni eval --json`` writes it."""
        rounded = {key: round(getattr(self, key), 6) for key in ("value", "low", "high")}
        return {"value": rounded["value"], "n": self.n, "low": rounded["low"], "high": rounded["high"]}


@dataclass(frozen=True)
class ListFigure:
    """A figure with one value a codebook; see :class:`Figure`."""

    value: list[float]
    n: int
    low: list[float]
    high: list[float]
    cases: tuple[Case, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The figure as ``omni eval --json`` writes it."""
        rounded = {key: [round(x, 6) for x in getattr(self, key)] for key in ("value", "low", "high")}
        return {"value": rounded["value"], "n": self.n, "low": rounded["low"], "high": rounded["high"]}


AnyFigure = TypeVar("AnyFigure", bound=Figure | ListFigure)
Said = Sequence[Mapping[str, Any]]  # raw predictions, one a case


def with_cases(figure: AnyFigure, said: Said) -> AnyFigure:
    """A figure that is no ratio of sums, with the raw predictions that it was computed from."""
    return replace(figure, cases=tuple(Case(item) for item in said))


def located(figure: AnyFigure, where: Sequence[str]) -> AnyFigure:
    """A figure whose cases know their places ``file:line``, given in the order of the cases."""
    return replace(figure, cases=tuple(replace(case, where=at) for case, at in zip(figure.cases, where, strict=True)))


def ratio(
    parts: Sequence[float], wholes: Sequence[float] | None = None, draws: int = 1000, said: Said | None = None
) -> Figure:
    """``sum(parts) / sum(wholes)`` (the mean without ``wholes``), resampling cases for the interval.

    Args:
        parts: one number a case.
        wholes: likewise.
        draws: resamples.
        said: the raw predictions behind the parts; without them a part is the raw value itself.
    """
    over = np.asarray(parts, dtype=np.float64)
    under = np.ones_like(over) if wholes is None else np.asarray(wholes, dtype=np.float64)
    n = len(over)
    if n == 0 or under.sum() == 0:
        return Figure(float("nan"), n, float("nan"), float("nan"))
    picks = np.random.default_rng(0).integers(0, n, (draws, n))
    low, high = np.quantile(over[picks].sum(1) / np.maximum(under[picks].sum(1), 1e-9), [0.025, 0.975])
    raw = said or [{}] * n
    cases = tuple(Case(item, float(a), float(b)) for item, a, b in zip(raw, over, under, strict=True))
    return Figure(float(over.sum() / under.sum()), n, float(low), float(high), cases)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> Figure:
    """WER after :func:`omni.tokenizer.spoken_text`: word edits over reference words."""
    pairs = [(spoken_text(r), spoken_text(h)) for r, h in zip(references, hypotheses, strict=True)]
    return _error_rate([(r.split(), h.split()) for r, h in pairs], said_and_true(references, hypotheses))


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> Figure:
    """CER after :func:`omni.tokenizer.spoken_text`: character edits over reference characters, spaces included."""
    return _error_rate(
        [(list(spoken_text(r)), list(spoken_text(h))) for r, h in zip(references, hypotheses, strict=True)],
        said_and_true(references, hypotheses),
    )


def said_and_true(references: Sequence[str], hypotheses: Sequence[str]) -> Said:
    """What should have been said or heard beside what was, case by case."""
    return [{"reference": r, "hypothesis": h} for r, h in zip(references, hypotheses, strict=True)]


def _error_rate(pairs: Sequence[tuple[list[str], list[str]]], said: Said) -> Figure:
    edits, sizes = [], []
    for reference, hypothesis in pairs:
        # jiwer compares words; characters become words by a separator that no text contains
        counts = jiwer.process_words(
            "\x1f".join(reference) or "\x1e",
            "\x1f".join(hypothesis),
            reference_transform=_SPLIT,
            hypothesis_transform=_SPLIT,
        )
        edits.append(counts.substitutions + counts.deletions + counts.insertions if reference else len(hypothesis))
        sizes.append(len(reference))
    return ratio(edits, sizes, said=said)


_SPLIT = jiwer.Compose([jiwer.ReduceToListOfListOfWords("\x1f")])


def accuracy(answers: Sequence[str], predictions: Sequence[str]) -> Figure:
    """Share of exact matches after :func:`omni.tokenizer.spoken_text`."""
    right = [float(spoken_text(a) == spoken_text(p)) for a, p in zip(answers, predictions, strict=True)]
    return ratio(right, said=said_and_true(answers, predictions))
