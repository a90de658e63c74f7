"""Runs of positions that see each other alone: documents of a window, captions of a batch.

A mask says the same, but scores that it forbids are computed all the same, and so are the positions of padding. Here
every run is attended over by itself, beside others of about its length. In nano's text that is 0.4 of the scores, of
which a causal kernel leaves out half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

_STEP = 32  # positions by which the lengths of two groups differ at least: each group is a call of the kernel more


class _Take(torch.autograd.Function):
    """Rows at ``places_M``; the gradient is taken back by ``back_N``, since each row counts at one place alone."""

    @staticmethod
    def forward(ctx: Any, x_NHd: torch.Tensor, places_M: torch.Tensor, back_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back_N)
        return x_NHd.index_select(0, places_M)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back_N,) = ctx.saved_tensors
        return grads[0].index_select(0, back_N), None, None


class _PutBack(torch.autograd.Function):
    """The other way; padding in between has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_MHd: torch.Tensor, back_N: torch.Tensor, places_M: torch.Tensor, padding_P: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(places_M, padding_P)
        return x_MHd.index_select(0, back_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        places_M, padding_P = ctx.saved_tensors
        return grads[0].index_select(0, places_M).index_fill_(0, padding_P, 0), None, None, None


class Unpadded(NamedTuple):
    """The positions of padded rows [B, T] that are worth computing, as one row.

    Attributes:
        places_N: of what is not padding, row by row, each position once; and of as much padding as makes N a multiple.
        segments: the rows, and that padding.
        shape: B and T.
    """

    places_N: torch.Tensor
    segments: Segments
    shape: tuple[int, int]

    def of(self, x_BT: torch.Tensor) -> torch.Tensor:
        """These positions of padded rows: [B, T, ...] to [1, N, ...]."""
        return x_BT.flatten(0, 1).index_select(0, self.places_N)[None]

    def padded(self, x_N: torch.Tensor) -> torch.Tensor:
        """The other way, [N, ...] to [B, T, ...]; all other positions are zero."""
        rows = x_N.new_zeros(self.shape[0] * self.shape[1], *x_N.shape[1:])
        return rows.index_copy(0, self.places_N, x_N).unflatten(0, self.shape)

    def to(self, device: torch.device, non_blocking: bool = False) -> Unpadded:
        """The same on a device."""
        places_N = self.places_N.to(device, non_blocking=non_blocking)
        return Unpadded(places_N, self.segments.to(device, non_blocking), self.shape)

    def pin_memory(self) -> Unpadded:
        """The same in memory that a GPU reads by itself."""
        return Unpadded(self.places_N.pin_memory(), self.segments.pin_memory(), self.shape)


def unpadded(valid_BT: torch.Tensor, multiple: int = 64) -> Unpadded:
    """Where rows that are True at ``valid_BT`` lie; ``multiple``: few shapes, as far as there is padding."""
    valid_N = valid_BT.flatten()
    places_N = valid_N.nonzero()[:, 0]
    more_N = (~valid_N).nonzero()[: -len(places_N) % multiple, 0]
    segments = Segments([*valid_BT.sum(1).tolist(), len(more_N)])
    return Unpadded(torch.cat([places_N, more_N]), segments, (valid_BT.shape[0], valid_BT.shape[1]))


class Group(NamedTuple):
    """Segments that are attended over in one call: how many, how long the longest is, and which keys are padding."""

    num_segments: int
    longest: int
    mask: torch.Tensor | None  # positive, [G, 1, 1, L]; None: nothing is padding


class Segments:
    """Where in a batch, its positions counted row by row, each segment lies.

    Args:
        lengths: of the segments, one after the other; together they are all positions. Empty ones are passed over.

    Attributes:
        numbers_N: of the segment that each position is in.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        sizes = np.array([length for length in lengths if length], dtype=np.int64)
        starts, order = sizes.cumsum() - sizes, sizes.argsort(kind="stable")
        sorted_sizes = sizes[order]
        places, valid = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
        self.groups: list[Group] = []
        end = len(order)
        while end:
            longest = int(sorted_sizes[end - 1])
            # all that are shorter by less than a step
            first = int(np.searchsorted(sorted_sizes, longest - _STEP, side="right"))
            members = order[first:end]
            within_L = np.arange(longest)
            valid_GL = within_L < sizes[members][:, None]
            mask = None if valid_GL.all() else torch.from_numpy(valid_GL)[:, None, None]
            self.groups.append(Group(len(members), longest, mask))
            places.append(np.where(valid_GL, starts[members][:, None] + within_L, 0).ravel())
            valid.append(valid_GL.ravel())
            end = first
        places_M, valid_M = np.concatenate(places), np.concatenate(valid)
        back_N = np.empty(int(sizes.sum()), dtype=np.int64)
        back_N[places_M[valid_M]] = valid_M.nonzero()[0]
        self.places_M, self.back_N = torch.from_numpy(places_M), torch.from_numpy(back_N)
        self.padding_P = torch.from_numpy((~valid_M).nonzero()[0])
        self.numbers_N = torch.from_numpy(np.arange(len(sizes)).repeat(sizes))

    def to(self, device: torch.device, non_blocking: bool = False) -> Segments:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        """The same in memory that a GPU reads by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Segments:
        changed = object.__new__(Segments)
        for name in ("numbers_N", "places_M", "padding_P", "back_N"):
            setattr(changed, name, change(getattr(self, name)))
        changed.groups = [
            group._replace(mask=None if group.mask is None else change(group.mask)) for group in self.groups
        ]
        return changed

    def mask(self, B: int, T: int, causal: bool) -> torch.Tensor:
        """The same as a positive mask [B, 1, T, T], for rows of which no segment crosses an end."""
        numbers_BT = self.numbers_N.view(B, T)
        same_BTT = numbers_BT[:, :, None] == numbers_BT[:, None, :]
        return (same_BTT.tril() if causal else same_BTT)[:, None]

    def attend(
        self,
        attend: Callable[..., torch.Tensor],
        q_BTHd: torch.Tensor,
        k_BTHd: torch.Tensor,
        v_BTHd: torch.Tensor,
        causal: bool,
    ) -> torch.Tensor:
        """Each segment's attention over itself, [B, T, H, d].

        Args:
            attend: :func:`omni.models.layers.attend`.
            q_BTHd: queries [B, T, H, d] of all positions.
            k_BTHd: keys, with as many heads or a divisor of it.
            v_BTHd: values like the keys.
            causal: whether a position sees those before it alone; what is padding stands behind them.
        """
        shapes = [(group.num_segments, group.longest) for group in self.groups]
        taken = (_Take.apply(x.flatten(0, 1), self.places_M, self.back_N) for x in (q_BTHd, k_BTHd, v_BTHd))
        split = (x_MHd.split([num * longest for num, longest in shapes]) for x_MHd in taken)
        parts = []
        for group, shape, *qkv in zip(self.groups, shapes, *split, strict=True):
            q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
            y_GHLd = attend(q, k, v, None if causal else group.mask, causal=causal and group.longest > 1)
            parts.append(y_GHLd.transpose(1, 2).flatten(0, 1))
        joined: torch.Tensor = _PutBack.apply(torch.cat(parts), self.back_N, self.places_M, self.padding_P)
        return joined.view(*q_BTHd.shape)
