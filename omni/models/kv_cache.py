"""What attention remembers: keys and values of all positions so far, in memory that is reserved ahead."""

from __future__ import annotations

from typing import Any

import torch


class Growing:
    """A tensor that grows along one dimension, in memory that is reserved ahead: twice what is needed, when it is full.

    Appending copies what is new and nothing else. For decoding alone: memory is written over, which autograd forbids.

    Args:
        dim: the dimension that grows.
    """

    def __init__(self, dim: int) -> None:
        self.length = 0
        self._dim = dim
        self._memory: torch.Tensor | None = None

    def append(self, x: torch.Tensor) -> torch.Tensor:
        """Put ``x`` behind what is there; returns everything, valid until the next call of :meth:`cut`."""
        assert not (x.requires_grad and torch.is_grad_enabled()), "what grows has no gradient; wrap it in no_grad"
        size = x.shape[self._dim]
        if self._memory is None or self.length + size > self._memory.shape[self._dim]:
            shape = list(x.shape)
            shape[self._dim] = max(2 * (self.length + size), 64)
            memory = x.new_empty(shape)
            if self._memory is not None:
                memory.narrow(self._dim, 0, self.length).copy_(self.whole)
            self._memory = memory
        self._memory.narrow(self._dim, self.length, size).copy_(x)
        self.length += size
        return self.whole

    @property
    def whole(self) -> torch.Tensor:
        """Everything that was appended and not cut off."""
        assert self._memory is not None
        return self._memory.narrow(self._dim, 0, self.length)

    def cut(self, length: int) -> None:
        """Forget all but the first ``length``."""
        assert 0 <= length <= self.length
        self.length = length


class KVCache:
    """Keys and values of all positions so far, for every layer of one model.

    Attributes:
        joined: by layer, what :mod:`omni.models.one_position` makes of its weights. Where these change, the keys are
            those of another model, so that both have one life.
    """

    def __init__(self, num_layers: int) -> None:
        self.joined: dict[int, Any] = {}
        self._layers = [(Growing(2), Growing(2)) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self._layers[0][0].length

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, H, T, d] of new positions; returns those of all positions."""
        keys, values = self._layers[layer]
        return keys.append(k), values.append(v)

    def cut(self, length: int) -> None:
        """Forget all positions but the first ``length``."""
        for pair in self._layers:
            for part in pair:
                part.cut(length)
