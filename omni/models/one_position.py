"""A transformer block at one new position behind a cache, with as few operations as it takes.

Decoding reads one position after the other. Its matrices are thin then, and a step takes as long as its operations take
to be started: at the size nano on two CPU cores more than half of a step was that. Here matrices that read the same
input stand side by side, the weights of norms are part of them, queries and keys are normed and turned together, and
nothing is asked that one position answers. :class:`omni.models.layers.Block` says the same for any number of positions,
and a test holds one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from omni.models.kv_cache import KVCache
from omni.models.layers import Block
from omni.models.segments import Segments


def run_block(
    block: nn.Module,
    x_BTD: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | Segments | None,
    cache: KVCache | None,
) -> torch.Tensor:
    """``block(x_BTD, rotary, mask, cache)``, in the shortest way."""
    assert isinstance(block, Block)
    learns = block.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x_BTD.device.type)
    # what was joined once is plain: asked at the first position alone
    if (
        cache is not None and x_BTD.shape[1] == 1 and not learns
        and (block.self_attn.layer in cache.joined or _is_plain(block))
    ):  # fmt: skip
        assert not isinstance(mask, Segments)
        return block_at_one_position(block, x_BTD, rotary, mask, cache)
    y_BTD: torch.Tensor = block(x_BTD, rotary, mask, cache)
    return y_BTD


def _is_plain(block: Block) -> bool:
    """Whether a block's projections are plain matrices (adapters are not), and one position is all that it reads."""
    attention, mlp = block.self_attn, block.mlp
    matrices = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return block.conv is None and all(
        type(matrix) is nn.Linear for matrix in (*matrices, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )


def block_at_one_position(
    block: Block,
    x_B1D: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    cache: KVCache,
) -> torch.Tensor:
    """What ``block`` in evaluation mode makes of one position, as its own ``forward`` would; nothing is learned.

    Args:
        block: in fp32, without adapters and without a convolution module, which needs more than one position.
        x_B1D: the position.
        rotary: its cosine and sine.
        mask: which positions [B, 1, 1, S + 1] it sees; None: all.
        cache: extended in place.
    """
    attention, (B, _, D) = block.self_attn, x_B1D.shape
    joined = cache.joined.get(attention.layer)
    if joined is None:
        joined = cache.joined[attention.layer] = join_weights(block)
    q_heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    cos, sin = (part.view(-1, 1, head_dim) for part in rotary)

    x_BD = x_B1D.view(B, D)
    qkv_BHd = torch.mm(_of_unit_length(x_BD, joined.floor), joined.qkv_proj).view(B, -1, head_dim)
    qk_BHd, v_BHd = qkv_BHd.split((q_heads + kv_heads, kv_heads), dim=1)
    qk_BHd = _of_unit_length(qk_BHd, joined.head_floor).mul_(joined.qk_norm)
    qk_BHd = torch.addcmul(qk_BHd * cos, qk_BHd.roll(head_dim // 2, -1), sin)
    q_BH1d, k_BH1d = qk_BHd[:, :, None].split((q_heads, kv_heads), dim=1)
    k, v = cache.extend(attention.layer, k_BH1d, v_BHd[:, :, None])
    y = F.scaled_dot_product_attention(q_BH1d, k, v, attn_mask=mask, enable_gqa=q_heads != kv_heads)
    x_BD = torch.addmm(x_BD, y.reshape(B, -1), joined.o_proj)
    gate, up = torch.mm(_of_unit_length(x_BD, joined.floor), joined.gate_up_proj).chunk(2, dim=1)
    return torch.addmm(x_BD, F.silu(gate).mul_(up), joined.down_proj).view(B, 1, D)


class JoinedWeights(NamedTuple):
    """A block's weights, side by side where they read the same input, with the norm before them multiplied in.

    Copies, which a cache of keys holds: these belong to the weights that they were made by, as the copies do. Inputs
    are rows, which for one row of 128 and 1,152 columns takes 17 microseconds instead of 26 on a CPU.

    Attributes:
        qkv_proj: [D, heads of queries, keys and values x head_dim].
        qk_norm: [heads of queries and keys, head_dim].
        o_proj: [heads of queries x head_dim, D], a view.
        gate_up_proj: [D, 2 F].
        down_proj: [F, D], a view.
        floor: what keeps a row of zeros from a length of zero, and ``head_floor`` for a head.
    """

    qkv_proj: torch.Tensor
    qk_norm: torch.Tensor
    o_proj: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    floor: torch.Tensor
    head_floor: torch.Tensor


def join_weights(block: Block) -> JoinedWeights:
    """The weights of a block whose projections are plain matrices."""
    attention, mlp = block.self_attn, block.mlp
    before_attention, before_mlp, q, k = (
        norm.weight * math.sqrt(len(norm.weight))
        for norm in (block.input_layernorm, block.post_attention_layernorm, attention.q_norm, attention.k_norm)
    )
    return JoinedWeights(
        _scaled_rows((attention.q_proj, attention.k_proj, attention.v_proj), before_attention),
        torch.cat([q.expand(attention.num_heads, -1), k.expand(attention.num_kv_heads, -1)]),
        attention.o_proj.weight.T,
        _scaled_rows((mlp.gate_proj, mlp.up_proj), before_mlp),
        mlp.down_proj.weight.T,
        block.input_layernorm.floor.to(q.device),
        attention.q_norm.floor.to(q.device),
    )


def _scaled_rows(matrices: Sequence[nn.Linear], scale_D: torch.Tensor) -> torch.Tensor:
    """The matrices as one [D, all that they put out], each row times its share of the scale."""
    return torch.cat([matrix.weight.T for matrix in matrices], dim=1).mul_(scale_D[:, None])


def _of_unit_length(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """RMSNorm without its weight, and without the square root of the width."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)
