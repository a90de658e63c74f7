"""The Thinker: a decoder-only language model in the layout of Qwen3.

It is the mind of the omni model. Text enters as token embeddings, pictures and recordings as embeddings that a
projector made (:mod:`omni.models.omni`); out come next-token logits, and hidden states of any layer for the Talker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from omni.config import Problem
from omni.models.attention_heads import start_by_copying, start_with_tasks
from omni.models.kv_cache import KVCache
from omni.models.layers import (
    Attention,
    Block,
    RMSNorm,
    RotaryPositions,
    check_finite,
    init_weights,
    quiet_residual_outputs,
)
from omni.models.one_position import run_block
from omni.models.segments import Segments


@dataclass(frozen=True)
class ThinkerConfig:
    """Shape of a Thinker."""

    ctx_len: int
    vocab_size: int = 0  # 0 in a configuration file: as many as the tokenizer has
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    hidden_dim: int = 768
    head_dim: int = 0  # 0: dim / num_heads
    rope_theta: float = 10000.0
    dropout: float = 0.0

    def problems(self) -> Iterator[Problem]:
        """Shapes that cannot be built."""
        if not self.head_dim and (self.dim % self.num_heads or self.head_size % 2):
            yield Problem(
                "dim", f"{self.dim} with {self.num_heads} heads", "an even multiple of num_heads, or head_dim"
            )
        if self.head_dim < 0 or self.head_dim % 2 or self.head_dim > self.dim:
            yield Problem(
                "head_dim", str(self.head_dim), f"an even number up to dim ({self.dim}), or 0: dim / num_heads"
            )
        if self.num_heads % self.num_kv_heads:
            yield Problem("num_kv_heads", str(self.num_kv_heads), f"a divisor of num_heads ({self.num_heads})")

    @property
    def head_size(self) -> int:
        """Numbers of a head's query."""
        return self.head_dim or self.dim // self.num_heads


@dataclass
class ThinkerOutput:
    """What one forward pass gives.

    Attributes:
        final_BTD: states after the last norm, which the logits are made of.
        hidden_states: ``hidden_states[n]`` [B, T, D] is the input of layer n, index ``num_layers`` the output of the
            last layer before the norm; only the layers asked for.
    """

    final_BTD: torch.Tensor
    hidden_states: dict[int, torch.Tensor]


class Thinker(nn.Module):
    """Decoder-only transformer: RMSNorm, rotary positions, grouped queries with QK-norm, SwiGLU, tied embeddings."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(
                config.dim,
                config.num_heads,
                config.hidden_dim,
                layer,
                causal=True,
                num_kv_heads=config.num_kv_heads,
                dropout=config.dropout,
                head_dim=config.head_size,
            )
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim)
        self.rotary = RotaryPositions(config.head_size, config.rope_theta)
        init_weights(self)
        # rows of length 1, and layers that say nothing at first: a token's identity stands alone in the residual
        # stream, where circuits that copy and look up find it. A last norm below 1 keeps the tied logits from
        # betting too high on repetition; the smaller it is, the later those circuits form (docs/log.md)
        nn.init.normal_(self.embed_tokens.weight, std=config.dim**-0.5)
        nn.init.constant_(self.norm.weight, 0.7)
        quiet_residual_outputs(self.layers)
        attentions = [part for part in self.layers.modules() if isinstance(part, Attention)]
        for attention in attentions:
            start_by_copying(attention)
        start_with_tasks(self.embed_tokens, attentions, config.rope_theta)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Token embeddings [B, T, D]."""
        return self.embed_tokens(tokens_BT)

    def forward(
        self,
        embeddings_BTD: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        mask: torch.Tensor | Segments | None = None,
        cache: KVCache | None = None,
        states_of: Sequence[int] = (),
    ) -> ThinkerOutput:
        """Run the decoder on embeddings.

        Args:
            embeddings_BTD: from :meth:`embed`, a projector, or both.
            positions_BT: rotary positions; by default they continue the cache's, counting from 0.
            mask: positive mask [B, 1, T, positions in the cache + T] for left-padded batches; or the segments, each
                of which sees itself alone; None: causal.
            cache: extended in place; the same states come out as from one pass over everything.
            states_of: layers whose input states are wanted.
        """
        T, start = embeddings_BTD.shape[1], cache.length if cache is not None else 0
        if positions_BT is None:
            positions_BT = torch.arange(start, start + T, device=embeddings_BTD.device)[None]
        if mask is None and start > 0 and T > 1:
            # SDPA's causal flag aligns to the first key; a chunk after a cache needs the last rows of the triangle
            rows = torch.arange(start, start + T, device=embeddings_BTD.device)
            mask = (torch.arange(start + T, device=rows.device)[None, :] <= rows[:, None])[None, None]
        rotary = self.rotary(positions_BT)
        x, states = embeddings_BTD, {}
        for number, layer in enumerate(self.layers):
            if number in states_of:
                states[number] = x
            x = run_block(layer, x, rotary, mask, cache)
        if len(self.layers) in states_of:
            states[len(self.layers)] = x
        return ThinkerOutput(self.norm(x), states)

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """Next-token logits [..., V] from final states [..., D].

        Raises:
            FloatingPointError: when they are not finite; the training loop skips such a batch.
        """
        logits = F.linear(final, self.embed_tokens.weight)
        check_finite(logits, "the Thinker's logits")
        return logits
