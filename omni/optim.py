"""Parameter groups, the optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from omni.config import PhaseConfig


def lr_ratio(step: int, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Learning rate of update ``step`` (0-based) over its peak: linear warm-up, then cosine to ``min_lr_ratio``.

    Being a pure function of the step, it needs no state in a checkpoint and follows a changed ``max_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


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


def build_optimizer(parameters: list[tuple[str, nn.Parameter]], config: PhaseConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon (Jordan et al., 2024) for the matrices of layers and AdamW for all else.

    Weight decay is for matrices only: vectors are norms, gains and biases, which decay would bias to zero. Embeddings,
    positions and heads are looked up or compared row by row; what Muon does to a matrix as a whole does not suit them.
    """
    chosen = [entry for entry in parameters if config.optimizer == "muon" and _is_layer_matrix(*entry)]
    taken = {id(parameter) for _, parameter in chosen}
    others = [parameter for _, parameter in parameters if id(parameter) not in taken]
    groups = [
        {"params": [parameter for parameter in others if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in others if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    # the fused kernel exists for CPU and CUDA and takes a third of the time of the default one
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True
    )
    if not chosen:
        return adamw
    matrices = [parameter for _, parameter in chosen]
    muon = torch.optim.Muon(
        matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Optimizers([adamw, muon])


def _is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and (".layers." in name or ".blocks." in name) and "embed" not in name
