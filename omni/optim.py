"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

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


def build_optimizer(parameters: list[tuple[str, nn.Parameter]], config: PhaseConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only (vectors are norms, gains and biases, which decay would bias to zero)."""
    matrices = [parameter for _, parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for _, parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # the fused kernel exists for CPU and CUDA and takes a third of the time of the default one
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True
    )
