"""Finds where a number stopped being finite: the first module whose output, or whose gradient, holds NaN or Inf."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn


class AnomalyWatch:
    """Watches every module of a model, as ``--detect_anomaly`` asks.

    Forward, modules report in the order in which they finish, so the first that is found is where the trouble began;
    backward, gradients arrive from the loss on, and the first that is found is the nearest to it. Each value that is
    looked at waits for the device, so this is for finding a fault, not for training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found = ""  # what was found since begin(), in a few words
        for name, module in model.named_modules():
            module.register_forward_hook(self._forward_hook(f"{name or 'the model'} ({type(module).__name__})"))

    def begin(self) -> None:
        """Forget what was found in an earlier step."""
        self.found = ""

    def report(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
        """What was found since :meth:`begin`, in a few words."""
        if self.found:
            return f"first in {self.found}"
        for name, parameter in parameters:
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"first in the gradient of {name}"
        return "every module's outputs and gradients are finite: it arises in the loss, or is too large, not infinite"

    def _forward_hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _floats(output):
                self._note(tensor, f"the output of {name}")
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._note(gradient, f"the gradient of the output of {name}"))

        return look

    def _note(self, tensor: torch.Tensor, what: str) -> None:
        if not self.found and not tensor.isfinite().all():
            kind = "NaN" if tensor.isnan().any() else "Inf"
            self.found = f"{what}: {kind}"


def _floats(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of a module's output: a tensor, a container or a dataclass of them."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floats(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _floats(vars(value))
