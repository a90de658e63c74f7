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
from omni.models.cross_attention import SPREAD, AttentionPool, CrossAttention
from omni.models.layers import (
    Block,
    KVCache,
    RMSNorm,
    check_finite,
    init_weights,
    quiet_residual_outputs,
    scale_residual_outputs,
)
from omni.models.segments import Unpadded
from omni.tokenizer import IGNORE

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
        self.positions_TD = nn.Parameter(torch.randn(config.max_text_len, config.text_dim) * SPREAD)
        self.blocks = nn.ModuleList(
            Block(
                config.text_dim, config.text_heads, config.text_hidden_dim, layer, causal=False, dropout=config.dropout
            )
            for layer in range(config.text_layers)
        )
        self.norm = RMSNorm(config.text_dim)
        self.pool = AttentionPool(config.text_dim, config.text_heads, config.embed_dim)

    def forward(self, tokens_BT: torch.Tensor, valid_BT: torch.Tensor, words: Unpadded | None = None) -> torch.Tensor:
        """Unit vectors [B, E]; see :meth:`VisionEncoder.encode_text`."""
        x = self.embed_tokens(tokens_BT) + self.positions_TD[: tokens_BT.shape[1]]
        if words is None or self.blocks[0].compiled:  # for rows, which have few shapes
            for block in self.blocks:
                x = block(x, mask=valid_BT[:, None, None, :])
            return self.pool(self.norm(x), valid_BT)
        x_1ND = words.of(x)
        for block in self.blocks:
            x_1ND = block(x_1ND, mask=words.segments)
        return self.pool(words.padded(self.norm(x_1ND)[0]), valid_BT)


class CaptionLayer(nn.Module):
    """Looks at the patch tokens, then at the words so far."""

    def __init__(self, config: VisionConfig, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.text_dim)
        self.look = CrossAttention(config.text_dim, config.dim, config.text_heads)
        self.block = Block(
            config.text_dim, config.text_heads, config.text_hidden_dim, layer, causal=True, dropout=config.dropout
        )

    def forward(
        self, x_BTD: torch.Tensor, patches_BPD: torch.Tensor, cache: KVCache | None, words: Unpadded | None
    ) -> torch.Tensor:
        """One layer; ``cache`` holds the words before, ``words`` are where [1, N, D] lie in the captions."""
        x_BTD = self.block(x_BTD, mask=None if words is None else words.segments, cache=cache)
        return x_BTD + self.look(self.norm(x_BTD), patches_BPD, rows=words)


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
        self,
        x_BTD: torch.Tensor,
        patches_BPD: torch.Tensor,
        start: int = 0,
        cache: KVCache | None = None,
        words: Unpadded | None = None,
    ) -> torch.Tensor:
        """Final states [B, T, D] of inputs at positions ``start`` and on; of ``words`` alone, [1, N, D]."""
        x = x_BTD + self.positions_TD[start : start + x_BTD.shape[1]]
        x = x if words is None else words.of(x)
        for layer in self.layers:
            x = layer(x, patches_BPD, cache, words)
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
        nn.init.normal_(self.text.embed_tokens.weight, std=SPREAD)
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

    def encode_text(
        self, tokens_BT: torch.Tensor, valid_BT: torch.Tensor, words: Unpadded | None = None
    ) -> torch.Tensor:
        """Unit vectors [B, E] of captions.

        Args:
            tokens_BT: captions, each with its end token.
            valid_BT: False at padding, which changes nothing.
            words: where ``valid_BT`` is True, for blocks that shall read nothing else.
        """
        return self.text(tokens_BT, valid_BT, words)

    def caption_states(
        self, patches_BPD: torch.Tensor, tokens_BT: torch.Tensor, words: Unpadded | None = None
    ) -> torch.Tensor:
        """States [B, T, D] that every token of the captions is told by, from the patches and the tokens before it.

        Of ``words`` alone: [1, N, D].
        """
        before = self.captioner.embed_tokens(tokens_BT[:, :-1])
        inputs = torch.cat([self.captioner.begin(len(tokens_BT)).to(before.dtype), before], dim=1)
        return self.captioner(inputs, patches_BPD, words=words)

    def caption_loss_sum(
        self, patches_BPD: torch.Tensor, tokens_BT: torch.Tensor, valid_BT: torch.Tensor, words: Unpadded
    ) -> torch.Tensor:
        """Cross-entropy of the captions' tokens, end token included, given the patch tokens; summed.

        Args:
            patches_BPD: patch tokens.
            tokens_BT: captions, each with its end token.
            valid_BT: False at padding.
            words: where ``valid_BT`` is True.
        """
        labels_BT = tokens_BT.masked_fill(~valid_BT, IGNORE)
        if self.text.blocks[0].compiled:  # for rows, which have few shapes
            states_BTD = self.caption_states(patches_BPD, tokens_BT)
        else:
            states_BTD, labels_BT = self.caption_states(patches_BPD, tokens_BT, words), words.of(labels_BT)
        logits_BTV = self.captioner.logits(states_BTD).float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")

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
