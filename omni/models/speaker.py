"""The speaker encoder: a few seconds of log-mel frames to one unit vector that says who speaks.

The Talker is conditioned on the vector of *another* utterance of the same speaker, so at inference a recording of
anybody can be given to it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from omni import ranks
from omni.models.layers import TimeConv, check_finite, init_weights, padding_mask


@dataclass(frozen=True)
class SpeakerConfig:
    """Shape of a speaker encoder."""

    num_mels: int = 80
    dim: int = 128
    num_layers: int = 3
    embedding_dim: int = 64


class SpeakerEncoder(nn.Module):
    """Strided convolutions, mean and standard deviation over time (Snyder et al., 2018), a unit vector."""

    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.num_mels, *[config.dim] * config.num_layers]
        self.convolutions = nn.ModuleList(
            TimeConv(inside, outside, kernel_size=5, stride=2 if number < 2 else 1, padding=2)
            for number, (inside, outside) in enumerate(itertools.pairwise(widths))
        )
        self.out_proj = nn.Linear(2 * config.dim, config.embedding_dim)
        init_weights(self)
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # of the similarities in the loss: exp(2.3) = 10

    def forward(self, frames_BFM: torch.Tensor, num_frames_B: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors [B, E] of log-mel frames [B, F, M].

        Raises:
            FloatingPointError: when they are not finite.
        """
        x = frames_BFM
        lengths = num_frames_B if num_frames_B is not None else torch.full((len(x),), x.shape[1], device=x.device)
        for convolution in self.convolutions:
            valid = padding_mask(lengths, x.shape[1])[:, :, None]
            x = F.gelu(convolution(x * valid.to(x.dtype)))
            if convolution.stride == (2,):
                lengths = (lengths + 1) // 2
        weights = padding_mask(lengths, x.shape[1])[:, :, None].float()
        x, count = x.float(), weights.sum(1).clamp(min=1)
        mean = (x * weights).sum(1) / count
        deviation = (((x - mean[:, None]).square() * weights).sum(1) / count + 1e-5).sqrt()
        embedding = self.out_proj(torch.cat([mean, deviation], dim=1)).float()
        check_finite(embedding, "the speaker embeddings")
        return F.normalize(embedding, dim=-1)


def speaker_loss_sum(
    encoder: SpeakerEncoder, first_BE: torch.Tensor, second_BE: torch.Tensor, speaker_B: torch.Tensor
) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al., 2020) summed over rows.

    Each first utterance shall be nearer to the second ones of its own speaker than to those of others. In the spirit
    of GE2E (Wan et al., 2018), but without fixed groups of utterances, so any speaker may occur any number of times.
    Rows are compared with those of all ranks; the sum is over this rank's.
    """
    logits_BN = first_BE @ ranks.whole_batch(second_BE).T * encoder.log_scale.exp().clamp(max=100)
    same_BN = (speaker_B[:, None] == ranks.whole_batch(speaker_B)[None, :]).float()
    log_share_BN = logits_BN.float().log_softmax(dim=1)
    return -((log_share_BN * same_BN).sum(1) / same_BN.sum(1)).sum()
