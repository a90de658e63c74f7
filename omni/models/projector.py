"""Projectors: what an encoder perceives, as embeddings the Thinker can read among its own.

Both kinds stack ``stack`` neighbouring states into one position (pictures stack squares of patches), so that a
recording or a picture takes few positions, and both leave with the RMS of the token embeddings, since the Thinker's
residual stream has known nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from omni.config import Problem
from omni.models.layers import RMSNorm, init_weights


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of a projector."""

    kind: Literal["linear", "swiglu"] = "swiglu"
    stack: int = 4  # states a position; of pictures rectangles of patches, squares where the number is one
    hidden_dim: int = 512
    context: int = 0  # positions on each side whose states a position of a recording sees as well

    @property
    def reach(self) -> int:
        """States that one position sees."""
        return self.stack * (1 + 2 * self.context)

    def problems(self) -> Iterator[Problem]:
        """Shapes that cannot be built."""
        if self.stack < 1:
            yield Problem("stack", str(self.stack), "at least 1")
        if self.hidden_dim < 1:
            yield Problem("hidden_dim", str(self.hidden_dim), "at least 1")
        if self.context < 0:
            yield Problem("context", str(self.context), "at least 0")


class LinearProjector(nn.Module):
    """Linear, ReLU, Linear over stacked states, as in SLAM-ASR (Ma et al., 2024)."""

    def __init__(self, in_dim: int, out_dim: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.up = nn.Linear(in_dim * config.reach, config.hidden_dim)
        self.down = nn.Linear(config.hidden_dim, out_dim)
        self.post_norm = RMSNorm(out_dim)
        init_weights(self)

    def forward(self, stacked: torch.Tensor) -> torch.Tensor:
        """[..., stack * in_dim] to [..., out_dim]."""
        return self.walk(stacked)["post_norm"]

    def walk(self, stacked: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every step on the way, by name, in order."""
        hidden = F.relu(self.up(stacked))
        down = self.down(hidden)
        return {"stacked": stacked, "hidden": hidden, "down": down, "post_norm": self.post_norm(down)}


class SwiGLUProjector(nn.Module):
    """RMSNorm, gated hidden layer, RMSNorm over stacked states, as in Tiny Audio (Kroman, 2025)."""

    def __init__(self, in_dim: int, out_dim: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(in_dim * config.reach)
        self.gate = nn.Linear(in_dim * config.reach, config.hidden_dim, bias=False)
        self.up = nn.Linear(in_dim * config.reach, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, out_dim, bias=False)
        self.post_norm = RMSNorm(out_dim)
        init_weights(self)

    def forward(self, stacked: torch.Tensor) -> torch.Tensor:
        """[..., stack * in_dim] to [..., out_dim]."""
        return self.walk(stacked)["post_norm"]

    def walk(self, stacked: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every step on the way, by name, in order."""
        h = self.pre_norm(stacked)
        gated = F.silu(self.gate(h)) * self.up(h)
        down = self.down(gated)
        return {"stacked": stacked, "pre_norm": h, "gated": gated, "down": down, "post_norm": self.post_norm(down)}


Projector = LinearProjector | SwiGLUProjector


def build_projector(in_dim: int, out_dim: int, config: ProjectorConfig) -> Projector:
    """The projector of a configuration."""
    return (LinearProjector if config.kind == "linear" else SwiGLUProjector)(in_dim, out_dim, config)


def match_rms(projector: Projector, embeddings_VD: torch.Tensor) -> None:
    """Give a projector's output the RMS of the token embeddings; to be called once, before training."""
    with torch.no_grad():
        projector.post_norm.weight.fill_(embeddings_VD.float().square().mean().sqrt())


def stack_states(states_BTD: torch.Tensor, stack: int, context: int = 0) -> torch.Tensor:
    """[B, T, D] to [B, ceil(T / stack), (1 + 2 * context) * stack * D]; the last group is padded with zeros.

    With a ``context`` each group has those beside it on both sides, in their order; beyond the ends they are zeros.
    """
    B, T, D = states_BTD.shape
    groups = F.pad(states_BTD, (0, 0, 0, -T % stack)).reshape(B, -1, stack * D)
    padded = F.pad(groups, (0, 0, context, context))
    return torch.cat([padded[:, shift : shift + groups.shape[1]] for shift in range(1 + 2 * context)], dim=-1)


def patch_rectangle(stack: int) -> tuple[int, int]:
    """Rows and columns of the patches that become one position: a square, or what is nearest to it."""
    rows = next(rows for rows in range(math.isqrt(stack), 0, -1) if stack % rows == 0)
    return rows, stack // rows


def num_stacked(num_patches: int, stack: int) -> int:
    """Positions that a picture of ``num_patches`` (a square number) takes."""
    side, (rows, columns) = math.isqrt(num_patches), patch_rectangle(stack)
    return -(-side // rows) * -(-side // columns)


def stack_patches(patches_BPD: torch.Tensor, stack: int) -> torch.Tensor:
    """Rectangles of ``stack`` patches become one position: [B, P, D] to [B, num_stacked(P), stack * D].

    This is pixel shuffle where ``stack`` is a square number; rectangles that reach over the edge are padded with zeros.
    """
    B, P, D = patches_BPD.shape
    side, (rows, columns) = math.isqrt(P), patch_rectangle(stack)
    grid = F.pad(patches_BPD.view(B, side, side, D), (0, 0, 0, -side % columns, 0, -side % rows))
    grid = grid.view(B, grid.shape[1] // rows, rows, grid.shape[2] // columns, columns, D)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(B, -1, stack * D)
