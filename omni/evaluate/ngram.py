"""The yardstick of stage A: an interpolated Kneser-Ney 5-gram model over characters (Chen and Goodman, 1999)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np


class KneserNey:
    """Character n-gram model with interpolated Kneser-Ney smoothing, absolute discount from the counts of counts.

    Below the highest order, counts are of distinct continuations. A character never seen in training falls back to
    a uniform distribution over 256 bytes.
    """

    def __init__(self, text: str, order: int = 5) -> None:
        self.order = order
        grams: list[Counter[str]] = [Counter()] * (order + 1)
        grams[order] = Counter(text[i : i + order] for i in range(len(text) - order + 1))
        for n in range(order - 1, 0, -1):
            # continuation count: how many different characters stand before this n-gram
            grams[n] = Counter(gram[1:] for gram in grams[n + 1])
        self.grams = grams
        self.totals: list[dict[str, int]] = [{} for _ in range(order + 1)]
        self.followers: list[dict[str, int]] = [{} for _ in range(order + 1)]
        self.discounts = [0.0] * (order + 1)
        for n in range(1, order + 1):
            totals: dict[str, int] = defaultdict(int)
            followers: dict[str, int] = defaultdict(int)
            for gram, count in grams[n].items():
                totals[gram[:-1]] += count
                followers[gram[:-1]] += 1
            self.totals[n], self.followers[n] = dict(totals), dict(followers)
            ones = sum(count == 1 for count in grams[n].values())
            twos = sum(count == 2 for count in grams[n].values())
            self.discounts[n] = ones / (ones + 2 * twos) if ones and twos else 0.5

    def probability(self, context: str, character: str) -> float:
        """P(character | the last ``order - 1`` characters of ``context``)."""
        p = 1 / 256
        for n in range(1, self.order + 1):
            history = context[-(n - 1) :] if n > 1 else ""
            if len(history) < n - 1:
                break
            total = self.totals[n].get(history)
            if not total:
                break
            discount = self.discounts[n]
            count = self.grams[n].get(history + character, 0)
            p = max(count - discount, 0) / total + discount * self.followers[n][history] / total * p
        return p

    def bits(self, text: str) -> Iterator[float]:
        """Bits of each character of ``text`` given those before it."""
        for i, character in enumerate(text):
            yield -math.log2(self.probability(text[max(0, i - self.order + 1) : i], character))

    def bits_per_byte(self, text: str, block: int = 1000) -> tuple[list[float], list[float]]:
        """Bits and bytes of each block of ``text``, for a ratio with an interval."""
        bits = np.fromiter(self.bits(text), dtype=np.float64, count=len(text))
        starts = range(0, len(text), block)
        return (
            [float(bits[s : s + block].sum()) for s in starts],
            [float(len(text[s : s + block].encode())) for s in starts],
        )
