"""The vision encoder: a picture to patch tokens for the Thinker, and to one vector near that of its caption.

What the Thinker will be asked (colour, shape, size, place) must stand in the *patch tokens*. A contrastive loss alone
does not put it there: it trains the pooled vector, and colour and place already separate most captions. So a small
decoder writes the caption from the patch tokens while they are learned (as in CoCa, Yu et al., 2022), and captions that
differ in one attribute stand among the contrastive texts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from omni.config import Problem
from omni.models.layers import (
    Block,
    KVCache,
    RMSNorm,
    attend,
    check_finite,
    init_weights,
    quiet_residual_outputs,
    scale_residual_outputs,
)

# of learned positions, and of words in the text tower: with the usual 0.02 the first norm multiplies their gradients by
# 35, and patches hardly know where they are beside a stem's output of spread 1
_SPREAD = 0.5
_MAX_SCALE = 100.0  # of the inverse temperature, as in CLIP (Radford et al., 2021), which starts at 1 / 0.07


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision encoder; ``text_*`` is the text tower and the caption decoder."""

    image_size: int = 64  # pixels a side
    patch_size: int = 8  # pixels a side; the stem halves the picture log2(patch_size) times
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    hidden_dim: int = 384
    stem_depth: int = 2  # convolutions at each resolution of the stem
    vocab_size: int = 0  # 0 in a configuration file: as many as the tokenizer has
    max_text_len: int = 64  # tokens of a caption, its end token included
    text_dim: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_hidden_dim: int = 384
    caption_layers: int = 1
    embed_dim: int = 128  # of pooled pictures and captions
    dropout: float = 0.0

    @property
    def num_patches(self) -> int:
        """Patch tokens a picture."""
        return (self.image_size // self.patch_size) ** 2

    def problems(self) -> Iterator[Problem]:
        """Shapes that cannot be built."""
        for key, heads in (("dim", self.num_heads), ("text_dim", self.text_heads)):
            width = {"dim": self.dim, "text_dim": self.text_dim}[key]
            if heads < 1 or width % heads:
                yield Problem(key, f"{width} with {heads} heads", "a multiple of its number of heads")
        if self.patch_size not in (2, 4, 8, 16, 32):
            yield Problem("patch_size", str(self.patch_size), "2, 4, 8, 16 or 32")
        elif self.dim % (self.patch_size // 2):
            yield Problem("dim", str(self.dim), f"a multiple of patch_size / 2 ({self.patch_size // 2})")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            yield Problem("image_size", str(self.image_size), f"a multiple of patch_size ({self.patch_size})")
        for name in ("num_layers", "stem_depth", "text_layers", "caption_layers", "embed_dim"):
            if getattr(self, name) < 1:
                yield Problem(name, str(getattr(self, name)), "at least 1")
        if self.max_text_len < 2:
            yield Problem("max_text_len", str(self.max_text_len), "at least 2")


@dataclass
class VisionOutput:
    """What the encoder gives for a batch of pictures.

    Attributes:
        patches_BPD: one token a patch, row by row, for the Thinker.
        pooled_BE: one unit vector a picture, comparable with :meth:`VisionEncoder.encode_text`.
    """

    patches_BPD: torch.Tensor
    pooled_BE: torch.Tensor


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
        self, x_BTD: torch.Tensor, memory_BPD: torch.Tensor, valid_BP: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, T, D] from queries [B, T, D] and memory [B, P, memory_dim]; ``valid_BP`` is False at padding."""
        q, k = self._queries_and_keys(x_BTD, memory_BPD)
        v = self.v_proj(memory_BPD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mask = None if valid_BP is None else valid_BP[:, None, None, :]
        y = attend(q, k, v.to(q.dtype), mask, causal=False)
        return self.o_proj(y.transpose(1, 2).flatten(2))

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
        self.query_1D = nn.Parameter(torch.randn(1, dim) * _SPREAD)
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


class ResidualConv(nn.Module):
    """Normalization over channels, GELU and a convolution, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Same shape out."""
        normed = self.norm(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x_BCHW + self.convolution(F.gelu(normed))


def grid_positions(side: int, dim: int) -> torch.Tensor:
    """Sines and cosines of row and column, [side * side, dim], to begin with (as in MAE, He et al., 2022).

    From random ones "the upper half" would have to be learned patch by patch; here it is a slope. Wavelengths run from
    two pictures to two patches.
    """
    waves = (dim + 3) // 4
    frequencies_W = math.pi * torch.logspace(0, math.log2(side), waves, base=2) / side
    angles_SW = (torch.arange(side) + 0.5)[:, None] * frequencies_W
    line_SJ = torch.cat([angles_SW.sin(), angles_SW.cos()], dim=1)
    grid = torch.cat([line_SJ[:, None].expand(-1, side, -1), line_SJ[None].expand(side, -1, -1)], dim=2)
    return grid.flatten(0, 1)[:, :dim].clone()


class ImageTower(nn.Module):
    """ViT (Dosovitskiy et al., 2021) with a convolutional stem instead of one linear patch embedding.

    The stem follows Xiao et al. (2021): measured here, recall@1 of 0.98 where linear patches had 0.78.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        halvings = config.patch_size.bit_length() - 1
        widths = [3, *(config.dim >> (halvings - 1 - i) for i in range(halvings))]
        stages = [
            [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                *(ResidualConv(after) for _ in range(config.stem_depth - 1)),
            ]
            for before, after in itertools.pairwise(widths)
        ]
        self.stem = nn.Sequential(*itertools.chain.from_iterable(stages))
        self.positions_PD = nn.Parameter(grid_positions(config.image_size // config.patch_size, config.dim))
        self.blocks = nn.ModuleList(
            Block(config.dim, config.num_heads, config.hidden_dim, layer, causal=False, dropout=config.dropout)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim)
        self.pool = AttentionPool(config.dim, config.num_heads, config.embed_dim)

    def forward(self, pixels_B3HW: torch.Tensor) -> VisionOutput:
        """Encode pixels of 0 to 255, uint8 or float; they are normalized here, on the model's device."""
        x_BCHW = (pixels_B3HW.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        x_BPD = self.stem(x_BCHW).flatten(2).transpose(1, 2) + self.positions_PD
        for block in self.blocks:
            x_BPD = block(x_BPD)
        patches_BPD = self.norm(x_BPD)
        return VisionOutput(patches_BPD, self.pool(patches_BPD))


class TextTower(nn.Module):
    """A caption to one vector: bidirectional blocks over the stage-A tokenizer's tokens, then attention pooling."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.text_dim)
        self.positions_TD = nn.Parameter(torch.randn(config.max_text_len, config.text_dim) * _SPREAD)
        self.blocks = nn.ModuleList(
            Block(
                config.text_dim, config.text_heads, config.text_hidden_dim, layer, causal=False, dropout=config.dropout
            )
            for layer in range(config.text_layers)
        )
        self.norm = RMSNorm(config.text_dim)
        self.pool = AttentionPool(config.text_dim, config.text_heads, config.embed_dim)

    def forward(self, tokens_BT: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, E]."""
        x = self.embed_tokens(tokens_BT) + self.positions_TD[: tokens_BT.shape[1]]
        for block in self.blocks:
            x = block(x, mask=valid_BT[:, None, None, :])
        return self.pool(self.norm(x), valid_BT)


class CaptionLayer(nn.Module):
    """Looks at the patch tokens, then at the words so far."""

    def __init__(self, config: VisionConfig, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.text_dim)
        self.look = CrossAttention(config.text_dim, config.dim, config.text_heads)
        self.block = Block(
            config.text_dim, config.text_heads, config.text_hidden_dim, layer, causal=True, dropout=config.dropout
        )

    def forward(self, x_BTD: torch.Tensor, patches_BPD: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """One layer; ``cache`` holds the words before."""
        x_BTD = self.block(x_BTD, cache=cache)
        return x_BTD + self.look(self.norm(x_BTD), patches_BPD)


class CaptionDecoder(nn.Module):
    """Writes a caption from patch tokens, kept small and shallow so that the tokens must hold what it says."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.text_dim)
        self.start_D = nn.Parameter(torch.randn(config.text_dim) * 0.02)
        self.positions_TD = nn.Parameter(torch.randn(config.max_text_len, config.text_dim) * 0.02)
        self.layers = nn.ModuleList(CaptionLayer(config, layer) for layer in range(config.caption_layers))
        self.norm = RMSNorm(config.text_dim)

    def begin(self, batch_size: int) -> torch.Tensor:
        """The input [B, 1, D] from which the first token is predicted."""
        return self.start_D.expand(batch_size, 1, -1)

    def forward(
        self, x_BTD: torch.Tensor, patches_BPD: torch.Tensor, start: int = 0, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Final states [B, T, D] of inputs at positions ``start`` and on."""
        x = x_BTD + self.positions_TD[start : start + x_BTD.shape[1]]
        for layer in self.layers:
            x = layer(x, patches_BPD, cache)
        return self.norm(x)

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """Next-token logits [..., V] from final states [..., D].

        Raises:
            FloatingPointError: when they are not finite.
        """
        logits = F.linear(final, self.embed_tokens.weight)
        check_finite(logits, "the caption decoder's logits")
        return logits


class VisionEncoder(nn.Module):
    """Image tower, text tower and caption decoder; stage E keeps the patch tokens, `omni inspect` the captions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config)
        self.text = TextTower(config)
        self.captioner = CaptionDecoder(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        init_weights(self)
        nn.init.normal_(self.text.embed_tokens.weight, std=_SPREAD)
        for blocks in (self.image.blocks, self.text.blocks):
            scale_residual_outputs(blocks)
        # as in the Thinker: at first nothing covers the words so far, by which the decoder finds its place
        for parameter in (self.captioner.embed_tokens.weight, self.captioner.positions_TD, self.captioner.start_D):
            nn.init.normal_(parameter, std=config.text_dim**-0.5)
        quiet_residual_outputs(self.captioner.layers)

    @property
    def scale(self) -> torch.Tensor:
        """The inverse temperature of the contrastive loss."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Hold the inverse temperature at 100 or less; to be called after every update."""
        self.log_scale.clamp_(max=math.log(_MAX_SCALE))

    def encode_image(self, pixels_B3HW: torch.Tensor) -> VisionOutput:
        """Patch tokens and a unit vector of pictures, uint8 [B, 3, image_size, image_size].

        Raises:
            FloatingPointError: when the vectors are not finite.
        """
        output = self.image(pixels_B3HW)
        check_finite(output.pooled_BE, "the vectors of the pictures")
        return output

    def encode_text(self, tokens_BT: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, E] of captions; ``valid_BT`` is False at padding, which changes nothing."""
        return self.text(tokens_BT, valid_BT)

    def caption_states(self, patches_BPD: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] that every token of the captions is told by, from the patches and the tokens before it."""
        before = self.captioner.embed_tokens(tokens_BT[:, :-1])
        inputs = torch.cat([self.captioner.begin(len(tokens_BT)).to(before.dtype), before], dim=1)
        return self.captioner(inputs, patches_BPD)

    def caption_loss_sum(
        self, patches_BPD: torch.Tensor, tokens_BT: torch.Tensor, valid_BT: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of the captions' tokens, end token included, given the patch tokens; summed."""
        states_ND = self.caption_states(patches_BPD, tokens_BT)[valid_BT]
        return F.cross_entropy(self.captioner.logits(states_ND).float(), tokens_BT[valid_BT], reduction="sum")

    @torch.no_grad()
    def count_right_tokens(self, pixels_B3HW: torch.Tensor, tokens_BT: torch.Tensor, valid_BT: torch.Tensor) -> int:
        """How many of the captions' tokens are the most likely ones, each given the true tokens before it."""
        states_BTD = self.caption_states(self.encode_image(pixels_B3HW).patches_BPD, tokens_BT)
        guesses_N = self.captioner.logits(states_BTD[valid_BT]).argmax(-1)
        return int((guesses_N == tokens_BT[valid_BT]).sum())

    @torch.no_grad()
    def caption(self, patches_BPD: torch.Tensor, end_id: int) -> list[list[int]]:
        """The most likely caption of each picture, token by token, without its end token."""
        cache = KVCache(len(self.captioner.layers))
        x, columns = self.captioner.begin(len(patches_BPD)), []
        ended_B = torch.zeros(len(patches_BPD), dtype=torch.bool, device=patches_BPD.device)
        for position in range(self.config.max_text_len):
            final_BD = self.captioner(x, patches_BPD, position, cache)[:, -1]
            tokens_B = self.captioner.logits(final_BD).argmax(-1)
            columns.append(tokens_B)
            ended_B |= tokens_B == end_id
            if bool(ended_B.all()):
                break
            x = self.captioner.embed_tokens(tokens_B)[:, None]
        rows = torch.stack(columns, dim=1).tolist()
        return [row[: row.index(end_id)] if end_id in row else row for row in rows]
