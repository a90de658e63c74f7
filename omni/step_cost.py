"""What a piece of computation takes: bytes of tensors that are alive at once, and floating-point operations.

Both are counted from the operations that really run, not from formulas about layers, so a new layer needs nothing here.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside of the block and are still alive, and their peak.

    A storage counts once, however many views it has, from the operation that makes it until nobody holds it any more:
    what autograd saves, what lies between two operations, gradients, optimizer state. Not counted is what a kernel
    takes and gives back inside of one operation.

    Attributes:
        now: bytes alive.
        peak: the most since the block began or since :meth:`begin_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}  # by id of the storage: the watch over its end

    def begin_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # what an operation changes in place is alive already: only what it did not get is new
        given = {id(item.untyped_storage()) for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)}
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                if id(storage) not in given and id(storage) not in self._known:
                    self._watch(storage)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        number, size = id(storage), storage.nbytes()

        def gone() -> None:
            self.now -= size
            self._known.pop(number, None)

        # a storage is one Python object for as long as any tensor holds it
        self._known[number] = weakref.finalize(storage, gone)
        self._known[number].atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)


def flop_counter() -> FlopCounterMode:
    """torch's counter of matrix products, convolutions and attention, two operations a multiplication.

    Attention counts in full, causal or not, as is usual. Two kernels are added or put right: the CPU's fused attention
    is not in torch's table, and its rule for the gradient of a convolution takes a grouped one for a full one.
    """
    cpu = _aten._scaled_dot_product_flash_attention_for_cpu
    cpu_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    rules = {cpu: _attention, cpu_backward: _attention_backward, _aten.convolution_backward: _convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=rules)


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **named: Any) -> int:
    """Scores and weighted values, from shapes [B, H, T, d], [B, H, S, d], [B, H, S, e]."""
    B, H, T, d = q
    return 2 * B * H * T * k[2] * (d + v[3])


def _attention_backward(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **named: Any
) -> int:
    """The scores once more, and two products for each of the two."""
    B, H, T, d = q
    return 2 * B * H * T * k[2] * (3 * d + 2 * v[3])


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, out_val: Any = None, **named: Any
) -> int:
    """As many as the convolution itself for each of the two gradients that is wanted."""
    wanted: list[bool] = list(rest[-1])
    positions = 1
    for size in [grad[0], *grad[2:]]:
        positions *= size
    forward = 2 * positions
    for size in weight:
        forward *= size
    return forward * (wanted[0] + wanted[1])
