"""Queries that look at the states of another sequence, and the pooling that is made of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from omni.models.layers import RMSNorm, attend
from omni.models.segments import Unpadded

# of learned positions, queries and words: with the usual 0.02 the first norm multiplies their gradients by 35, and
# patches hardly know where they are beside a stem's output of spread 1
SPREAD = 0.5


class CrossAttention(nn.Module):
    """Queries of one sequence over the states of another, with RMSNorm on queries and keys as in the other layers."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(memory_dim, dim, bias=False)
        self.v_proj = nn.Linear(memory_dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(dim // num_heads), RMSNorm(dim // num_heads)

    def forward(
        self,
        x_BTD: torch.Tensor,
        memory_BPD: torch.Tensor,
        valid_BP: torch.Tensor | None = None,
        rows: Unpadded | None = None,
    ) -> torch.Tensor:
        """[B, T, D] from queries [B, T, D] and memory [B, P, memory_dim].

        Args:
            x_BTD: queries; with ``rows`` [1, N, D].
            memory_BPD: what they look at.
            valid_BP: False at the memory's padding.
            rows: where the queries lie in rows, as many as the memory has.
        """
        q, k = self._queries_and_keys(x_BTD, memory_BPD)
        if rows is not None:
            q = rows.padded(q.transpose(1, 2)[0]).transpose(1, 2)
        v = self.v_proj(memory_BPD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mask = None if valid_BP is None else valid_BP[:, None, None, :]
        y = attend(q, k, v.to(q.dtype), mask, causal=False).transpose(1, 2).flatten(2)
        return self.o_proj(y if rows is None else rows.of(y))

    def weights(self, x_BTD: torch.Tensor, memory_BPD: torch.Tensor) -> torch.Tensor:
        """What each query takes from each state, [B, H, T, P]; they sum to 1 over P."""
        q, k = self._queries_and_keys(x_BTD, memory_BPD)
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)

    def _queries_and_keys(self, x_BTD: torch.Tensor, memory_BPD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q_norm(self.q_proj(x_BTD).unflatten(-1, (self.num_heads, -1))).transpose(1, 2)
        return q, self.k_norm(self.k_proj(memory_BPD).unflatten(-1, (self.num_heads, -1))).transpose(1, 2)


class AttentionPool(nn.Module):
    """One learned query over all states, then a unit vector (the pooling head of SigLIP, Zhai et al., 2023)."""

    def __init__(self, dim: int, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.query_1D = nn.Parameter(torch.randn(1, dim) * SPREAD)
        self.attention = CrossAttention(dim, dim, num_heads)
        self.norm = RMSNorm(dim)
        self.proj = nn.Linear(dim, embed_dim, bias=False)

    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, D] to unit vectors [B, E] in fp32: the temperature multiplies their errors by up to 100."""
        query_B1D = self.query_1D.to(x_BTD.dtype).expand(len(x_BTD), 1, -1)
        pooled_BD = self.attention(query_B1D, x_BTD, valid_BT)[:, 0]
        return F.normalize(self.proj(self.norm(pooled_BD)).float(), dim=-1)

    def weights(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """What the pooled vector takes from each state, [B, T], mean over the heads."""
        query_B1D = self.query_1D.to(x_BTD.dtype).expand(len(x_BTD), 1, -1)
        return self.attention.weights(query_B1D, x_BTD)[:, :, 0].mean(dim=1)
