"""The audio encoder: log-mel frames to states for the Thinker, and to characters by CTC.

The blocks work at 25 Hz, where attention is cheap; CTC needs more steps than that (English has about 15 characters a
second, and a repeated character costs two steps), so every state emits ``steps_per_state`` CTC steps: 50 Hz by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from omni.audio import MelConfig, log_mel
from omni.config import Problem
from omni.models.ctc import ctc_sum, prefix_search
from omni.models.layers import (
    Block,
    ConvLayer,
    RMSNorm,
    RotaryPositions,
    TimeConv,
    check_finite,
    init_weights,
    padding_mask,
    scale_residual_outputs,
)
from omni.tokenizer import Characters


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Shape of an audio encoder."""

    dim: int = 192
    num_layers: int = 4
    num_heads: int = 4
    hidden_dim: int = 512
    conv_kernel: int = 15
    reduction: int = 4  # mel frames a state: 100 Hz / 4 = 25 Hz
    steps_per_state: int = 2  # CTC steps a state: 50 Hz
    dropout: float = 0.1
    mixing: Literal["attention", "convolution"] = "attention"  # how states hear of each other
    mel: MelConfig = field(default_factory=MelConfig)

    def num_steps(self, num_frames: int) -> int:
        """CTC steps for a number of mel frames."""
        for _ in range(self.reduction.bit_length() - 1):
            num_frames = (num_frames + 1) // 2
        return num_frames * self.steps_per_state

    def problems(self) -> Iterator[Problem]:
        """Shapes that cannot be built."""
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            yield Problem("dim", f"{self.dim} with {self.num_heads} heads", "an even multiple of num_heads")
        if self.reduction not in (1, 2, 4, 8):
            yield Problem("reduction", str(self.reduction), "1, 2, 4 or 8")
        if self.steps_per_state < 1 or self.steps_per_state > self.reduction:
            yield Problem("steps_per_state", str(self.steps_per_state), "from 1 to reduction")
        if self.conv_kernel % 2 == 0:
            yield Problem("conv_kernel", str(self.conv_kernel), "an odd width")


@dataclass
class AudioOutput:
    """What the encoder gives for a batch.

    Attributes:
        states_BTD: states at ``frame_rate / reduction``, for the Thinker.
        num_states_B: how many of them are not padding.
        log_probs_BSV: CTC log-probabilities, ``steps_per_state`` steps a state.
        num_steps_B: how many of those are not padding.
    """

    states_BTD: torch.Tensor
    num_states_B: torch.Tensor
    log_probs_BSV: torch.Tensor
    num_steps_B: torch.Tensor


class AudioEncoder(nn.Module):
    """Convolutional reduction, bidirectional blocks with a depthwise convolution (as in Conformer), a CTC head."""

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.mel.num_mels
        convolutions: list[nn.Module] = []
        for _ in range(config.reduction.bit_length() - 1):
            convolutions.append(TimeConv(width, config.dim, kernel_size=5, stride=2, padding=2))
            width = config.dim
        self.convolutions = nn.ModuleList(convolutions or [TimeConv(width, config.dim, 5, padding=2)])
        self.blocks = nn.ModuleList(_block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim)
        self.rotary = RotaryPositions(config.dim // config.num_heads)
        self.head = nn.Linear(config.dim, config.steps_per_state * Characters.size)
        init_weights(self)
        if config.mixing == "attention":
            scale_residual_outputs(self.blocks)

    def num_states(self, num_frames_B: torch.Tensor) -> torch.Tensor:
        """States for a number of mel frames."""
        for _ in range(self.config.reduction.bit_length() - 1):
            num_frames_B = (num_frames_B + 1) // 2
        return num_frames_B

    def num_steps(self, num_frames: int) -> int:
        """CTC steps for a number of mel frames."""
        return self.config.num_steps(num_frames)

    def forward(self, frames_BFM: torch.Tensor, num_frames_B: torch.Tensor) -> AudioOutput:
        """Encode normalized log-mel frames (:class:`omni.audio.LogMel`), padded to the longest.

        Raises:
            FloatingPointError: when the logits are not finite.
        """
        valid_BT = padding_mask(num_frames_B, frames_BFM.shape[1])
        num_states_B = num_frames_B
        # the mean spectrum of an utterance is its voice and its microphone, not its words; frames count by their
        # loudness, so that silence around speech does not change what speech looks like
        loudness_BF = log_mel(self.config.mel).magnitudes(frames_BFM).mean(dim=-1) * valid_BT
        share_BF1 = (loudness_BF / loudness_BF.sum(dim=1, keepdim=True).clamp(min=1e-5))[..., None]
        mean_B1M = (frames_BFM * share_BF1).sum(dim=1, keepdim=True)
        x = frames_BFM - mean_B1M
        for convolution in self.convolutions:
            # zero what is padding before every convolution, so that padding changes nothing
            x = F.gelu(convolution(x * valid_BT[:, :, None].to(x.dtype)))
            if self.config.reduction > 1:
                num_states_B = (num_states_B + 1) // 2
            valid_BT = padding_mask(num_states_B, x.shape[1])
        rotary = self.rotary(torch.arange(x.shape[1], device=x.device)[None])
        mask = None if bool(valid_BT.all()) else valid_BT[:, None, None, :]
        for block in self.blocks:
            x = block(x, valid_BT) if isinstance(block, ConvLayer) else block(x, rotary, mask, valid_BT=valid_BT)
        states_BTD = self.norm(x)
        return AudioOutput(states_BTD, num_states_B, self.read(states_BTD), num_states_B * self.config.steps_per_state)

    def read(self, states_BTD: torch.Tensor) -> torch.Tensor:
        """CTC log-probabilities [B, S, V] of states, fp32. Raises FloatingPointError when they are not finite."""
        logits = self.head(states_BTD).unflatten(-1, (self.config.steps_per_state, -1)).flatten(1, 2)
        check_finite(logits, "the audio encoder's logits")
        return logits.float().log_softmax(dim=-1)


def _block(config: AudioEncoderConfig, layer: int) -> nn.Module:
    """Attention and a depthwise convolution, or depthwise convolutions alone (QuartzNet, Kriman et al., 2020)."""
    if config.mixing == "convolution":
        return ConvLayer(config.dim, config.conv_kernel, config.hidden_dim, config.dropout)
    return Block(
        config.dim, config.num_heads, config.hidden_dim, layer, causal=False, conv_kernel=config.conv_kernel,
        dropout=config.dropout,
    )  # fmt: skip


def ctc_loss_sum(output: AudioOutput, symbols_BS: torch.Tensor, num_symbols_B: torch.Tensor) -> torch.Tensor:
    """CTC loss summed over utterances; infeasible ones must have been left out at load time."""
    assert Characters.blank == 0
    return ctc_sum(output.log_probs_BSV, symbols_BS, output.num_steps_B, num_symbols_B)


def transcripts(output: AudioOutput, beam: int = 8) -> list[str]:
    """The most probable text of each utterance, all of its paths together (CTC prefix search).

    The best single path loses what is spread over neighbouring steps, spaces above all.
    """
    characters, steps_B = Characters(), output.num_steps_B.tolist()
    rows = zip(output.log_probs_BSV.float().cpu(), steps_B, strict=True)
    return [characters.decode(prefix_search(log_probs_SV[:steps], beam)[0][0]) for log_probs_SV, steps in rows]
