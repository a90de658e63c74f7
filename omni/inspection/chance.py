"""Whether a difference is larger than chance would make it: of figures with intervals, and of training curves.

Figures of the same cases are compared case by case where the predictions of both are kept: if the two models were the
same, which said what would be a toss-up, case by case (approximate randomization: Noreen, 1989; Riezler & Maxwell,
2005). Otherwise there is an interval over test cases and nothing more, and the test is an unpaired one: the interval of
the difference follows from those of both figures (MOVER: Zou & Donner, 2008). It finds only larger differences.

Curves of two runs differ by more than the noise along each of them: another seed ends at another loss. How far seeds
lie apart is measured where several runs of one recipe are given, and assumed otherwise; both are weighed as in Smyth
(2004).

Many differences are looked at together, so p is held against Holm's (1979) limits: among all of them, at most one time
in twenty is any called larger than chance that is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats would take a second to import

from omni.curves import Curve, is_number

LEVEL = 0.05
_Z = 1.959964  # half-width of a 95 % interval in standard errors
# What losses of two seeds are assumed to differ by, as standard deviation of their logarithms. Measured over six seeds
# of a small Thinker (64 wide, 2 layers, 120 steps of 4 documents): 0.066 in training, whose documents the seed chooses,
# with the noise along the curve, and 0.011 in validation; assumed with some care, and worth so many degrees of freedom.
SEED_SPREAD = {"train": 0.05, "val": 0.02}
SEED_FREEDOM = 2.0
_LAST_PART = 1 / 3  # of the common steps: what is compared of two curves
_DRAWS = 20_000  # tosses of a paired test: p of 1 / 20,000 stands up to Holm's limits among hundreds of figures
Scores = dict[tuple[str, str], tuple[float, float]]  # part and whole of each case
_FEWEST = 4  # points in it from which the noise along a curve is measured


@dataclass(frozen=True)
class Difference:
    """A difference between two runs.

    Attributes:
        value: second minus first; of curves, second over first minus 1.
        low: of its 95 % interval.
        high: of the same.
        p: of a difference as large by chance alone; NaN where it cannot be said.
        larger: whether it is larger than chance, among all that were looked at together.
        paired: whether it was judged case by case.
    """

    value: float
    low: float
    high: float
    p: float
    larger: bool = False
    paired: bool = False

    @property
    def verdict(self) -> str:
        """In words."""
        if math.isnan(self.p):
            return "cannot be said"
        return "larger than chance" if self.larger else "not more than chance"


_UNKNOWN = Difference(math.nan, math.nan, math.nan, math.nan)


# ---- figures ----


def figure_difference(first: dict[str, Any], second: dict[str, Any]) -> Difference:
    """The difference of two figures as ``omni eval --json`` writes them (``value``, ``n``, ``low``, ``high``)."""
    one, other = _spread(first), _spread(second)
    if one is None or other is None:
        return _UNKNOWN
    (a, a_below, a_above), (b, b_below, b_above) = one, other
    value = b - a
    below, above = math.hypot(b_below, a_above), math.hypot(b_above, a_below)
    towards = below if value > 0 else above  # the side of the interval on which 0 lies
    if towards == 0:
        p = 1.0 if value == 0 else 0.0
    else:
        p = math.erfc(abs(value) / towards * _Z / math.sqrt(2))
    return Difference(value, value - below, value + above, p)


def paired_difference(first: Scores, second: Scores) -> Difference | None:
    """The difference of two ratios over the same cases; None where the cases, or what they count, are not the same.

    Args:
        first: part and whole of each case, by what tells cases apart.
        second: likewise.
    """
    if first.keys() != second.keys() or len(first) < 2:
        return None
    pairs = np.array([(*first[key], *second[key]) for key in first])  # part, whole, part, whole
    total = pairs[:, 1].sum()
    if not np.array_equal(pairs[:, 1], pairs[:, 3]) or not total or not np.isfinite(pairs).all():
        return None
    changes, n = pairs[:, 2] - pairs[:, 0], len(pairs)
    value = float(changes.sum() / total)
    # of a ratio of sums, the error of the whole by linearization; Student's t since cases may be few
    rest = changes - value * pairs[:, 1]
    reach = float(stdtrit(n - 1, 0.975)) * math.sqrt(float((rest**2).sum()) * n / (n - 1)) / float(total)
    moved = changes[changes != 0]
    # the tolerance is for sums that are equal but for the order of their terms
    as_large = int((_tossed(moved) >= abs(float(moved.sum())) * (1 - 1e-9)).sum()) if len(moved) else _DRAWS
    return Difference(value, value - reach, value + reach, (1 + as_large) / (1 + _DRAWS), paired=True)


def _tossed(changes: np.ndarray) -> np.ndarray:
    """How far apart two models would be if a toss had said, case by case, which said what; of many tosses."""
    rng = np.random.default_rng(0)
    blocks = (rng.integers(0, 2, (1000, len(changes))) * 2 - 1 for _ in range(_DRAWS // 1000))
    return np.concatenate([np.abs(block @ changes) for block in blocks])


def _spread(figure: dict[str, Any]) -> tuple[float, float, float] | None:
    """A figure's value and the half-widths of its interval below and above; None where there are none."""
    found = [figure.get(key) for key in ("value", "n", "low", "high")]
    if not all(map(is_number, found)):
        return None
    value, n, low, high = (float(number) for number in found if number is not None)
    if n < 2:
        return None
    below, above = value - low, high - value
    if below == above == 0 and value in (0.0, 1.0):
        # all cases alike: the bootstrap sees no spread, yet one of the next may be otherwise (Wilson's bound)
        bound = _Z**2 / (n + _Z**2)
        return (value, 0.0, bound) if value == 0 else (value, bound, 0.0)
    if below < 0 or above < 0:  # a biased bootstrap, as of a perplexity: its width is good, its place is not
        below = above = (high - low) / 2
    # bootstrap intervals of few cases are narrow (Hesterberg, 2015): Student's t instead of the normal
    wider = float(stdtrit(n - 1, 0.975)) / _Z * math.sqrt(n / (n - 1))
    return value, below * wider, above * wider


# ---- curves ----


@dataclass(frozen=True)
class _Level:
    """Where a run's curve ended: the mean, the variance of that mean by the noise along it, and its freedom."""

    value: float
    variance: float
    freedom: float


def curve_difference(
    first: Sequence[Curve], second: Sequence[Curve], spread: float, others: Sequence[Sequence[Curve]] = ()
) -> Difference:
    """The difference between two recipes, by the last third of the steps that all curves have.

    Args:
        first: one curve a seed of the first recipe.
        second: the same of the second.
        spread: what seeds are assumed to differ by; see ``SEED_SPREAD``.
        others: curves of other recipes with several seeds, which help to say how far seeds lie apart.

    Returns:
        The relative difference of the losses, or "cannot be said" where there are no common steps or a loss is not
        positive.
    """
    groups = [list(first), list(second), *map(list, others)]
    if not all(item.steps for item in [*first, *second]):
        return _UNKNOWN
    last = min(item.steps[-1] for group in groups[:2] for item in group)
    levels = [[level for item in group if (level := _level(item, last)) is not None] for group in groups]
    if any(len(found) != len(group) for found, group in zip(levels[:2], groups[:2], strict=True)):
        return _UNKNOWN
    one, other = levels[:2]
    values = [np.array([level.value for level in group]) for group in levels]
    value = float(values[1].mean() - values[0].mean())
    if [item.values for item in first] == [item.values for item in second]:
        return Difference(0.0, 0.0, 0.0, 1.0)  # one run twice
    freedom = sum(len(group) - 1 for group in values if len(group))
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in values if len(group))
    seed_variance = (SEED_FREEDOM * spread**2 + squares) / (SEED_FREEDOM + freedom)
    parts = [(seed_variance * (1 / len(one) + 1 / len(other)), SEED_FREEDOM + freedom)]
    # with several seeds the noise along the curves is part of what lies between them; it is counted once more
    parts += [(level.variance / len(group) ** 2, level.freedom) for group in (one, other) for level in group]
    variance = sum(part for part, _ in parts)
    degrees = variance**2 / sum(part**2 / free for part, free in parts)  # Welch and Satterthwaite
    reach = float(stdtrit(degrees, 0.975)) * math.sqrt(variance)
    p = 2 * float(stdtr(degrees, -abs(value) / math.sqrt(variance)))
    return Difference(math.expm1(value), math.expm1(value - reach), math.expm1(value + reach), p)


def _level(curve: Curve, last: int) -> _Level | None:
    """The logarithm of a curve over the last part of ``last`` steps; None where that has no point."""
    points = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if step <= last]
    tail = [value for step, value in points if step > last * (1 - _LAST_PART)] or [value for _, value in points[-1:]]
    if not tail or min(tail) <= 0:
        return None
    logs = np.log(np.array(tail))
    if len(logs) < _FEWEST:  # a validation or two: their noise is far below that of seeds
        return _Level(float(logs.mean()), 0.0, 1.0)
    times = np.arange(len(logs)) - (len(logs) - 1) / 2
    rest = logs - logs.mean() - times * (times @ logs) / (times @ times)  # the loss still falls
    # of single points, and of means of blocks, since neighbours may be alike: the larger one, as few blocks say little
    blocks = np.array([block.mean() for block in np.array_split(rest, min(8, len(rest) // 2))])
    estimates = [
        (float((part**2).sum()) / max(1, len(part) - 2) / len(part), len(part) - 2.0) for part in (rest, blocks)
    ]
    variance, freedom = max(estimates)
    return _Level(float(logs.mean()), variance, max(1.0, freedom))


# ---- together ----


def judged(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences with ``larger`` set by Holm's procedure over all that can be said."""
    order = sorted((i for i, item in enumerate(differences) if not math.isnan(item.p)), key=lambda i: differences[i].p)
    larger: set[int] = set()
    for rank, index in enumerate(order):
        if differences[index].p > LEVEL / (len(order) - rank):
            break
        larger.add(index)
    return [replace(item, larger=index in larger) for index, item in enumerate(differences)]
