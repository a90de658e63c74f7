"""The codec: log-mel frames to a few codes 33 times a second, and back.

It gives the Talker an alphabet: speech becomes a sequence of symbols that a language model can write. It is trained
before the Talker and then frozen, because an alphabet that keeps changing cannot be learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from omni.audio import SILENCE
from omni.config import Problem
from omni.models.layers import ConvLayer, check_finite, init_weights, padding_mask
from omni.models.quantizer import QuantizerConfig, ResidualQuantizer


@dataclass(frozen=True)
class CodecConfig:
    """Shape of a codec."""

    num_mels: int = 80
    reduction: int = 3  # mel frames a code frame: 100 Hz / 3 = 33.3 Hz
    dim: int = 256
    num_layers: int = 3  # residual layers on either side
    kernel: int = 5
    hidden_factor: int = 2
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def problems(self) -> Iterator[Problem]:
        """Shapes that cannot be built."""
        if self.reduction not in (1, 2, 3, 4):
            yield Problem("reduction", str(self.reduction), "1, 2, 3 or 4")
        if self.kernel % 2 == 0:
            yield Problem("kernel", str(self.kernel), "an odd width")

    @property
    def look_ahead(self) -> int:
        """Code frames that the decoder sees beyond the one it decodes."""
        return self.num_layers * (self.kernel // 2)


@dataclass
class CodecOutput:
    """What the codec gives for a batch in training.

    Attributes:
        frames_BFM: decoded log-mel frames.
        codes_BTK: codes, ``reduction`` mel frames each.
        commitment_sum: see :class:`omni.models.quantizer.Quantized`.
    """

    frames_BFM: torch.Tensor
    codes_BTK: torch.Tensor
    commitment_sum: torch.Tensor


class Codec(nn.Module):
    """Convolutional encoder, residual quantizer, convolutional decoder, all on log-mel frames."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.dim * config.hidden_factor
        patch = config.reduction * config.num_mels
        self.in_proj = nn.Linear(patch, config.dim)
        self.encoder = nn.ModuleList(ConvLayer(config.dim, config.kernel, hidden) for _ in range(config.num_layers))
        self.to_code = nn.Linear(config.dim, config.quantizer.dim)
        self.quantizer = ResidualQuantizer(config.quantizer)
        self.from_code = nn.Linear(config.quantizer.dim, config.dim)
        self.decoder = nn.ModuleList(ConvLayer(config.dim, config.kernel, hidden) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.out_proj = nn.Linear(config.dim, patch)
        init_weights(self)

    def num_codes(self, num_frames: torch.Tensor) -> torch.Tensor:
        """Code frames for a number of mel frames."""
        return -(-num_frames // self.config.reduction)

    def latents(self, frames_BFM: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors [B, T, D] before quantization; F must be a multiple of ``reduction``."""
        B, F_, _ = frames_BFM.shape
        x = self.in_proj(frames_BFM.reshape(B, F_ // self.config.reduction, -1))
        for layer in self.encoder:
            x = layer(x, valid_BT)
        return self.to_code(x)

    def render(self, vectors_BTD: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Log-mel frames [B, F, M] from quantized vectors.

        Raises:
            FloatingPointError: when they are not finite.
        """
        x = self.from_code(vectors_BTD)
        for layer in self.decoder:
            x = layer(x, valid_BT)
        frames = self.out_proj(self.norm(x)).unflatten(-1, (self.config.reduction, -1)).flatten(1, 2)
        check_finite(frames, "the codec's frames")
        return frames

    def forward(self, frames_BFM: torch.Tensor) -> CodecOutput:
        """Encode, quantize and decode crops [B, F, M] without padding."""
        quantized = self.quantizer(self.latents(frames_BFM))
        frames = self.render(quantized.vectors_BTD)
        return CodecOutput(frames, quantized.codes_BTK, quantized.commitment_sum)

    @torch.no_grad()
    def encode(self, frames_BFM: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        """Codes [B, T, K] of padded recordings; row b has ``num_codes(num_frames_B[b])`` of them."""
        missing = -frames_BFM.shape[1] % self.config.reduction
        inside = padding_mask(num_frames_B, frames_BFM.shape[1])
        frames = F.pad(frames_BFM.masked_fill(~inside[:, :, None], SILENCE), (0, 0, 0, missing), value=SILENCE)
        valid_BT = padding_mask(self.num_codes(num_frames_B), frames.shape[1] // self.config.reduction)
        return self.quantizer(self.latents(frames, valid_BT)).codes_BTK

    @torch.no_grad()
    def decode(self, codes_BTK: torch.Tensor, num_codes_B: torch.Tensor | None = None) -> torch.Tensor:
        """Log-mel frames [B, F, M], ``reduction`` for each code frame, of padded codes."""
        valid_BT = None if num_codes_B is None else padding_mask(num_codes_B, codes_BTK.shape[1])
        return self.render(self.quantizer.decode(codes_BTK), valid_BT).float()
