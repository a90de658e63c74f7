"""Parameter groups, the optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from omni.config import PhaseConfig, UserError
from omni.runtime import multiplies_bf16


def lr_ratio(step: int, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Learning rate of update ``step`` (0-based) over its peak: linear warm-up, then cosine to ``min_lr_ratio``.

    Being a pure function of the step, it needs no state in a checkpoint and follows a changed ``max_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def get_lr_scheduler(
    optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int, min_lr_ratio: float = 0.1
) -> Callable[[int], float]:
    """A function that sets the optimizer's learning rate for an update and returns it: warm-up, then cosine."""
    peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set_lr(step: int) -> float:
        ratio = lr_ratio(step, warmup_steps, max_steps, min_lr_ratio)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * ratio
        return peaks[0] * ratio

    return set_lr


def trainable_parameters(modules: Iterable[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that require a gradient, each once, in a stable order."""
    seen: set[int] = set()
    found: list[tuple[str, nn.Parameter]] = []
    for position, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{position}.{name}", parameter))
    return found


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al., 2024), with all matrices of one shape orthogonalized at once.

    The step size is matched to AdamW's (Liu et al., 2025). An update of the Talker of nano takes 24 ms on two CPU cores
    instead of 40, and one kernel instead of 28 on a GPU.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
                updates = orthogonalized(torch.stack(directions), group["ns_coefficients"], group["ns_steps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))

    def _direction(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """The gradient with Nesterov momentum."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)


def orthogonalized(matrices_NIJ: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Matrices with singular values of about 1 instead of their own, by Newton and Schulz's iteration.

    In bf16, which is precise enough, where the hardware multiplies it; elsewhere in fp32.
    """
    a, b, c = coefficients
    x = matrices_NIJ.to(torch.bfloat16 if multiplies_bf16(matrices_NIJ.device) else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if tall else x
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).to(x.dtype)  # singular values are below 1 now
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizers(torch.optim.Optimizer):
    """Several optimizers, each for parameters of its own, as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        # the groups are the parts' own, so that a schedule and an unscaling reach them; there is no state of its own
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the parts' states."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_optimizer(
    parameters: list[tuple[str, nn.Parameter]], config: PhaseConfig, ratios: Sequence[float] = ()
) -> torch.optim.Optimizer:
    """AdamW, or Muon (Jordan et al., 2024) for the matrices of layers and AdamW for all else.

    Args:
        parameters: from :func:`trainable_parameters`.
        config: learning rates, weight decay, which optimizer.
        ratios: learning rate of each module's parameters over the configuration's; empty: 1.

    Weight decay is for matrices only: vectors are norms, gains and biases, which decay would bias to zero. Embeddings,
    positions and heads are looked up or compared row by row; what Muon does to a matrix as a whole does not suit them.
    """
    by_ratio: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        ratio = ratios[int(name.partition(".")[0])] if ratios else 1.0
        by_ratio.setdefault(ratio, []).append((name, parameter))
    groups: list[dict[str, Any]] = []
    matrices: list[dict[str, Any]] = []
    for ratio, entries in by_ratio.items():
        chosen = [entry for entry in entries if config.optimizer == "muon" and _is_layer_matrix(*entry)]
        taken = {id(parameter) for _, parameter in chosen}
        others = [parameter for _, parameter in entries if id(parameter) not in taken]
        wide, thin = ([p for p in others if p.ndim >= 2], [p for p in others if p.ndim < 2])
        groups.append({"params": wide, "weight_decay": config.weight_decay, "lr": config.lr * ratio})
        groups.append({"params": thin, "weight_decay": 0.0, "lr": config.lr * ratio})
        matrices.append({"params": [parameter for _, parameter in chosen], "lr": config.muon_lr * ratio})
    # the fused kernel exists for CPU and CUDA and takes a third of the time of the default one
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True
    )
    matrices = [group for group in matrices if group["params"]]
    if not matrices:
        return adamw
    return Optimizers([adamw, Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)])


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], key: str) -> None:
    """Load an optimizer's state.

    Raises:
        UserError: when it is that of another kind of optimizer (``key`` is where the configuration names the kind), or
            of other parameters.
    """
    found, expected = ("muon" if muon else "adamw" for muon in (isinstance(optimizer, Optimizers), "parts" in state))
    if found != expected:
        raise UserError(f"{key}: found {found}, expected {expected} as before; or use --fresh to start over")
    now = optimizer.state_dict()
    if _group_sizes(now) != _group_sizes(state):
        raise UserError(
            f"{key}: found a checkpoint that trained other parameters, or with other groups of learning rates, "
            "expected the same ones; put back the keys that say what is trained, or use --fresh to start over"
        )
    optimizer.load_state_dict(state)


def _group_sizes(state: dict[str, Any]) -> list[int]:
    """How many parameters each group of an optimizer's state has."""
    parts = state.get("parts", [state])
    return [len(group["params"]) for part in parts for group in part["param_groups"]]


def _is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and (".layers." in name or ".blocks." in name) and "embed" not in name
