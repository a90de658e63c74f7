"""Heads that begin with a task: some look a number of tokens back, some look for what followed a word before.

To look something up a decoder needs two heads in a row: one that says at each position what stood before it, and one
that finds the position before which the word at hand stood (induction heads; Olsson et al., 2022). From random weights
neither has a gradient before the other is there, and a small Thinker waits for it through most of its training. As
mimetic initialization does (Trockman and Kolter, 2023), this gives such heads their form and leaves all else random:
no word is known, and every weight is trained. Measured on random tokens that are said twice (nano, AdamW): accuracy
0.9 after 50 steps instead of 0.01 after 150; docs/log.md has what it gives on text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from omni.models.layers import Attention

_COMMON = 0.5  # length of what all embeddings share; rows are of length 1 beside it
_FREQUENCIES = (0.4, 0.3, 0.2, 0.1)  # shares of the fastest rotary frequencies in "so many tokens back"
_SHARPNESS = 1.5  # gain of queries times gain of keys
_LOUDNESS = 0.18  # what a head adds to the residual stream is then about as long as an embedding
_NOISE = 0.1  # of the usual random weights, in queries and keys of such a head


def start_by_copying(attention: Attention, copy: float = 0.3, match: float = 0.2) -> None:
    """Let attention begin as what it will have to be: queries look for keys like themselves, and copy what is there.

    Products of query and key matrices, and of value and output matrices, have a share of the identity from the start
    (mimetic initialization, Trockman and Kolter, 2023). Measured on sequences that repeat themselves: a Thinker of nano
    size predicts the repetition after 50 to 100 steps of AdamW instead of 200.

    Args:
        attention: freshly initialized.
        copy: share of the values that the output hands on.
        match: share of a query's weights, in variance, that are its key's.
    """
    groups = attention.num_heads // attention.num_kv_heads
    with torch.no_grad():
        k, v = (
            part.weight.unflatten(0, (attention.num_kv_heads, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)
            for part in (attention.k_proj, attention.v_proj)
        )
        attention.q_proj.weight.mul_(math.sqrt(1 - match)).add_(k, alpha=math.sqrt(match))
        attention.o_proj.weight.copy_(copy * v.T)


def start_with_tasks(embed_tokens: nn.Embedding, attentions: Sequence[Attention], theta: float) -> None:
    """Give embeddings a common direction, and heads a task each.

    First and last layer: all heads but the last group look 1, 2, 3, 1, ... tokens back. Layers between: the first half
    of the groups are induction heads, which read what the first layer's first head has written; the others look back.

    Args:
        embed_tokens: rows of length about 1.
        attentions: of the layers in order, freshly initialized.
        theta: base of the rotary frequencies.
    """
    with torch.no_grad():
        dim, d = embed_tokens.embedding_dim, attentions[0].head_dim
        common_D = torch.randn(dim)
        common_D /= common_D.norm()
        along_V1 = (embed_tokens.weight @ common_D)[:, None]
        embed_tokens.weight.add_((_COMMON - along_V1) * common_D)
        before_dD = _orthonormal(d, dim)  # what of a word is handed to the next position
        before_dD -= (before_dD @ common_D)[:, None] * common_D
        written_dD = _orthonormal(d, dim)  # and where it is written there
        for number, attention in enumerate(attentions):
            first, ends = number == 0, number in (0, len(attentions) - 1)
            kv_heads, groups = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads
            inductive = 0 if ends else max(1, kv_heads // 2)
            tasked = max(1, kv_heads - 1) if ends else kv_heads
            for part in (attention.q_norm, attention.k_norm):
                part.weight.fill_(math.sqrt(_SHARPNESS))
            for kv_head in range(tasked):
                heads = range(kv_head * groups, (kv_head + 1) * groups)
                if kv_head < inductive:
                    _find_again(attention, kv_head, heads, before_dD, written_dD)
                else:
                    back = [(head - inductive * groups) % 3 + 1 for head in heads]
                    handed_on = (before_dD, written_dD) if first and kv_head == 0 else None
                    _look_back(attention, kv_head, heads, back, common_D, theta, handed_on)


def _look_back(
    attention: Attention,
    kv_head: int,
    heads: Sequence[int],
    back: Sequence[int],
    common_D: torch.Tensor,
    theta: float,
    handed_on: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Let queries and keys be the same at all positions, turned so that they meet ``back`` tokens apart."""
    d, dim = attention.head_dim, attention.q_proj.in_features
    pairs = min(len(_FREQUENCIES), d // 2)
    sizes = torch.tensor(_FREQUENCIES[:pairs]).mul(d).sqrt()
    angles = theta ** -(2 * torch.arange(pairs) / d)
    # an input has length sqrt(dim), and this share of it is common
    scale = math.sqrt((1 + _COMMON**2) / dim) / _COMMON
    key_d = torch.zeros(d)
    key_d[:pairs] = sizes
    _rows(attention.k_proj, kv_head, d).copy_(scale * key_d[:, None] * common_D + _noise(d, dim))
    read, written = handed_on or (_orthonormal(d, dim), None)
    _rows(attention.v_proj, kv_head, d).copy_(read)
    for head, distance in zip(heads, back, strict=True):
        query_d = torch.zeros(d)
        query_d[:pairs] = sizes * torch.cos(distance * angles)
        query_d[d // 2 : d // 2 + pairs] = -sizes * torch.sin(distance * angles)
        _rows(attention.q_proj, head, d).copy_(scale * query_d[:, None] * common_D + _noise(d, dim))
        place = _orthonormal(d, dim) if written is None or head != heads[0] else written
        _columns(attention.o_proj, head, d).copy_(_LOUDNESS * place.T)


def _find_again(
    attention: Attention, kv_head: int, heads: Sequence[int], before_dD: torch.Tensor, written_dD: torch.Tensor
) -> None:
    """Let a query be the word here, a key the word before; copy the word that is found.

    Only slow rotary frequencies take part: the others would compare distances as well.
    """
    d, dim = attention.head_dim, attention.q_proj.in_features
    slow = torch.arange(3 * d // 16, d // 2)
    rows = torch.cat([slow, slow + d // 2])
    mix_dd = torch.zeros(d, d)
    mix_dd[rows] = _orthonormal(len(rows), d)
    _rows(attention.k_proj, kv_head, d).copy_(mix_dd @ written_dD + _noise(d, dim))
    copied_dD = _orthonormal(d, dim)
    _rows(attention.v_proj, kv_head, d).copy_(copied_dD)
    for head in heads:
        _rows(attention.q_proj, head, d).copy_(mix_dd @ before_dD + _noise(d, dim))
        _columns(attention.o_proj, head, d).copy_(_LOUDNESS * copied_dD.T)


def _rows(linear: nn.Linear, head: int, head_dim: int) -> torch.Tensor:
    """What leads into a head."""
    return linear.weight[head * head_dim : (head + 1) * head_dim]


def _columns(linear: nn.Linear, head: int, head_dim: int) -> torch.Tensor:
    """What leads out of a head."""
    return linear.weight[:, head * head_dim : (head + 1) * head_dim]


def _noise(rows: int, columns: int) -> torch.Tensor:
    return _NOISE * torch.randn(rows, columns) / math.sqrt(columns)


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Random rows of length 1, at right angles to each other."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T
