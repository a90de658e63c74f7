"""How the next token or code is drawn from a model's logits: the same for text and for speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """Settings of the draw. A temperature of 0 takes the most probable one."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # nucleus sampling (Holtzman et al., 2020)
    seed: int = 0


GREEDY = Sampling()


class Chances:
    """Uniform random numbers for the rows of a batch, each row's from a generator of its own.

    What a row draws depends on the seed and on the row's key, and not on the rows beside it: a batch says what each of
    its rows would have said alone.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[int]) -> None:
        self._rows = [np.random.default_rng((sampling.seed, key)) for key in keys] if sampling.temperature > 0 else []

    def next(self, num_rows: int) -> torch.Tensor | None:
        """The next number [B] of each of the first rows; None where nothing is drawn."""
        numbers_B1 = self.next_several(num_rows, 1)
        return None if numbers_B1 is None else numbers_B1[:, 0]

    def next_several(self, num_rows: int, count: int) -> torch.Tensor | None:
        """The next ``count`` numbers [B, count] of each of the first rows; None where nothing is drawn."""
        if not self._rows:
            return None
        return torch.from_numpy(np.stack([generator.random(count) for generator in self._rows[:num_rows]]))


def choose(logits_BV: torch.Tensor, sampling: Sampling, chance_B: torch.Tensor | None) -> torch.Tensor:
    """The next token or code of each row [B].

    Args:
        logits_BV: one row each.
        sampling: how it is drawn.
        chance_B: a number from 0 to 1 for each row, which decides; unused at temperature 0.
    """
    if sampling.temperature <= 0 or chance_B is None:
        return logits_BV.argmax(-1)
    # the most probable first, so that what is left out is the end of the row
    ordered, indices_BV = (logits_BV.double() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = float("-inf")
    if sampling.top_p < 1:
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= sampling.top_p, float("-inf"))
    shares_BV = ordered.softmax(-1)
    sums_BV = shares_BV.cumsum(-1)
    wanted_B1 = chance_B.to(logits_BV.device)[:, None] * sums_BV[:, -1:]
    last_B = (shares_BV > 0).sum(-1) - 1  # rounding must not lead beyond what may be drawn
    picks_B = torch.minimum((sums_BV <= wanted_B1).sum(-1), last_B)
    return indices_BV.gather(1, picks_B[:, None])[:, 0]
