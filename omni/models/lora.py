"""Low-rank adapters (LoRA, Hu et al., 2021): a matrix stays as it is, and a product of two thin ones is added to it.

    y = W x + (alpha / rank) B A x

B begins at zero, so that a new adapter changes nothing. Once trained, the product can be added to W for good
(:func:`merged`): the model is then as it was before, only with other weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from omni.config import Problem, UserError
from omni.models.layers import init_weights

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """Which projections get adapters, and of what rank."""

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0  # the product counts alpha / rank times
    projections: tuple[str, ...] = PROJECTIONS
    keep_apart: bool = False  # `omni.pt` holds the adapters beside the weights instead of merged into them

    def problems(self) -> Iterator[Problem]:
        """Adapters that cannot be built."""
        if self.rank < 0:
            yield Problem("rank", str(self.rank), "at least 1, or 0 for no adapters")
        if not 0 < self.alpha < float("inf"):
            yield Problem("alpha", str(self.alpha), "more than 0")
        for name in self.projections:
            if name not in PROJECTIONS:
                yield Problem("projections", repr(name), f"some of {', '.join(PROJECTIONS)}")
        if not self.projections:
            yield Problem("projections", "none", f"some of {', '.join(PROJECTIONS)}")


class LowRank(nn.Module):
    """The product B A, times alpha / rank."""

    def __init__(self, in_dim: int, out_dim: int, config: LoRAConfig) -> None:
        super().__init__()
        self.a_proj = nn.Linear(in_dim, config.rank, bias=False)
        self.b_proj = nn.Linear(config.rank, out_dim, bias=False)
        self.scale = config.alpha / config.rank
        init_weights(self)
        nn.init.zeros_(self.b_proj.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_dim] to [..., out_dim]."""
        return self.scale * self.b_proj(self.a_proj(x))

    def matrix(self) -> torch.Tensor:
        """What it adds to the weight [out_dim, in_dim], in fp32."""
        return self.scale * (self.b_proj.weight.float() @ self.a_proj.weight.float())


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter; its weight has the name that it has without."""

    adapter: LowRank

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        assert linear.bias is None, "no projection here has a bias"
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.adapter = LowRank(linear.in_features, linear.out_features, config)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output and the adapter's."""
        return F.linear(input, self.weight) + self.adapter(input)


def add_adapters(module: nn.Module, config: LoRAConfig) -> None:
    """Give every named projection inside of ``module`` a new adapter.

    Raises:
        UserError: when the rank is more than a projection's width, which would be no saving.
    """
    named = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for name, linear in named:
        above, _, last = name.rpartition(".")
        if last not in config.projections:
            continue
        width = min(linear.in_features, linear.out_features)
        if config.rank > width:
            raise UserError(f"lora.rank: found {config.rank}, expected at most {width}, the width of {name}")
        setattr(module.get_submodule(above), last, AdaptedLinear(linear, config))


def adapters(module: nn.Module) -> list[nn.Module]:
    """The adapters inside of a module."""
    return [part for part in module.modules() if isinstance(part, LowRank)]


@torch.no_grad()
def merged(module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a module with every adapter added to its weight: that of the module without adapters."""
    state = dict(state)
    for name, part in module.named_modules():
        if isinstance(part, AdaptedLinear):
            state[f"{name}.weight"] = part.weight + part.adapter.matrix().to(part.weight.dtype)
            for key in part.adapter.state_dict():
                del state[f"{name}.adapter.{key}"]
    return state
