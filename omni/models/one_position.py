"""A transformer block at one new position behind a cache, with as few operations as it takes.

Decoding reads one position after the other. Its matrices are thin then, and a step takes as long as its operations take
to be started: at the size nano on two CPU cores more than half of a step was that. Here layers are called past
``nn.Module.__call__`` (no hooks), nothing is asked that one position answers, and queries and keys are not turned
around twice. :class:`omni.models.layers.Block` says the same for any number of positions, and a test holds one against
the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from omni.models.kv_cache import KVCache
from omni.models.layers import Block


def run_block(
    block: nn.Module,
    x_BTD: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    cache: KVCache | None,
) -> torch.Tensor:
    """``block(x_BTD, rotary, mask, cache)``, in the shortest way."""
    assert isinstance(block, Block)
    learns = block.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x_BTD.device.type)
    if cache is not None and x_BTD.shape[1] == 1 and block.conv is None and not learns:
        return block_at_one_position(block, x_BTD, rotary, mask, cache)
    y_BTD: torch.Tensor = block(x_BTD, rotary, mask, cache)
    return y_BTD


def block_at_one_position(
    block: Block,
    x_B1D: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    cache: KVCache,
) -> torch.Tensor:
    """What ``block`` in evaluation mode makes of one position, as its own ``forward`` would; nothing is learned.

    Args:
        block: without a convolution module, which needs more than one position.
        x_B1D: the position.
        rotary: its cosine and sine.
        mask: which positions [B, 1, 1, S + 1] it sees; None: all.
        cache: extended in place.
    """
    attention, mlp, (B, _, D) = block.self_attn, block.mlp, x_B1D.shape
    half = attention.head_dim // 2
    cos, sin = (part.view(-1, 1, attention.head_dim).to(x_B1D.dtype) for part in rotary)

    def turned(x_BHd: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x_BHd * cos, x_BHd.roll(half, -1), sin)[:, :, None]

    x_BD = x_B1D.view(B, D)
    normed_BD = block.input_layernorm.forward(x_BD)
    heads, kv_heads = (B, attention.num_heads, attention.head_dim), (B, attention.num_kv_heads, attention.head_dim)
    q = turned(attention.q_norm.forward(attention.q_proj.forward(normed_BD).view(heads)))
    k = turned(attention.k_norm.forward(attention.k_proj.forward(normed_BD).view(kv_heads)))
    k, v = cache.extend(attention.layer, k, attention.v_proj.forward(normed_BD).view(kv_heads)[:, :, None])
    grouped = attention.num_heads != attention.num_kv_heads
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    x_BD = x_BD + attention.o_proj.forward(y.reshape(B, -1))
    normed_BD = block.post_attention_layernorm.forward(x_BD)
    gated = F.silu(mlp.gate_proj.forward(normed_BD)) * mlp.up_proj.forward(normed_BD)
    return (x_BD + mlp.down_proj.forward(gated)).view(B, 1, D)
