"""Figures with their uncertainty: rates, error rates of recognized speech, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jiwer
import numpy as np

from omni.tokenizer import spoken_text


@dataclass(frozen=True)
class Figure:
    """A measured value with the number of cases behind it and a 95 % bootstrap interval over those cases."""

    value: float
    n: int
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """The figure as ``omni eval --json`` writes it."""
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class ListFigure:
    """A figure with one value a codebook; see :class:`Figure`."""

    value: list[float]
    n: int
    low: list[float]
    high: list[float]

    def to_dict(self) -> dict[str, Any]:
        """The figure as ``omni eval --json`` writes it."""
        rounded = {key: [round(x, 6) for x in getattr(self, key)] for key in ("value", "low", "high")}
        return {"value": rounded["value"], "n": self.n, "low": rounded["low"], "high": rounded["high"]}


def ratio(parts: Sequence[float], wholes: Sequence[float] | None = None, draws: int = 1000) -> Figure:
    """``sum(parts) / sum(wholes)`` (the mean without ``wholes``), resampling cases for the interval."""
    over = np.asarray(parts, dtype=np.float64)
    under = np.ones_like(over) if wholes is None else np.asarray(wholes, dtype=np.float64)
    n = len(over)
    if n == 0 or under.sum() == 0:
        return Figure(float("nan"), n, float("nan"), float("nan"))
    picks = np.random.default_rng(0).integers(0, n, (draws, n))
    low, high = np.quantile(over[picks].sum(1) / np.maximum(under[picks].sum(1), 1e-9), [0.025, 0.975])
    return Figure(float(over.sum() / under.sum()), n, float(low), float(high))


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> Figure:
    """WER after :func:`omni.tokenizer.spoken_text`: word edits over reference words."""
    pairs = [(spoken_text(r), spoken_text(h)) for r, h in zip(references, hypotheses, strict=True)]
    return _error_rate([(r.split(), h.split()) for r, h in pairs])


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> Figure:
    """CER after :func:`omni.tokenizer.spoken_text`: character edits over reference characters, spaces included."""
    return _error_rate(
        [(list(spoken_text(r)), list(spoken_text(h))) for r, h in zip(references, hypotheses, strict=True)]
    )


def _error_rate(pairs: Sequence[tuple[list[str], list[str]]]) -> Figure:
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
    return ratio(edits, sizes)


_SPLIT = jiwer.Compose([jiwer.ReduceToListOfListOfWords("\x1f")])


def accuracy(answers: Sequence[str], predictions: Sequence[str]) -> Figure:
    """Share of exact matches after :func:`omni.tokenizer.spoken_text`."""
    return ratio([float(spoken_text(a) == spoken_text(p)) for a, p in zip(answers, predictions, strict=True)])
