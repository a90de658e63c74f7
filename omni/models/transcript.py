"""Recordings as the Thinker reads them: CTC over its own tokens, and the tokens heard as embeddings in a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from omni.models.ctc import ctc_sum
from omni.models.layers import padding_mask


class TranscriptHead(nn.Module):
    """Reads projected audio as text: CTC (Graves et al., 2006) over the Thinker's own tokens.

    The logits are products with the Thinker's token embeddings: what is learned is to say each word where it is heard
    by nearly the embedding that it has in writing. Without it the way from sounds to words has to be found through the
    whole Thinker. Measured: word error rate 0.13 after 300 steps of the projector alone; 0.59 after all of phase `sft`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.blank_D = nn.Parameter(torch.randn(dim) * 0.1)
        self.log_scale = nn.Parameter(torch.tensor(0.5))

    def symbols(self, embeddings_VD: torch.Tensor) -> torch.Tensor:
        """Embeddings of the symbols, fp32: blank, then the tokens."""
        return torch.cat([self.blank_D[None].float(), embeddings_VD.float()])

    def forward(self, projected_NSD: torch.Tensor, embeddings_VD: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [N, S, 1 + V], fp32; index 0 is blank, 1 + t the token t."""
        with torch.autocast(projected_NSD.device.type, enabled=False):
            logits_NSV = self.log_scale.exp() * projected_NSD.float() @ self.symbols(embeddings_VD).T
            return logits_NSV.log_softmax(dim=-1)

    def as_written(
        self, log_probs_NSV: torch.Tensor, embeddings_VD: torch.Tensor, positions_N: torch.Tensor
    ) -> torch.Tensor:
        """What is heard as it would stand in writing: embeddings [N, S, D], fp32, the words in a row at the end.

        A position that says a token holds the mean of all embeddings, weighted by their probabilities (as LegoSLM, Ma
        et al., 2025, reads CTC); one that says nothing holds blank. Those come first: what the Thinker learned in
        writing, such as to look up what followed a word, needs the words beside one another (Gaido et al., 2021, leave
        the others out; here they stay, so that a recording takes as many positions as its length says). Projected
        states themselves are near the embedding only in direction (cosine 0.6), and two and a half times as long.

        Args:
            log_probs_NSV: of :meth:`forward`.
            embeddings_VD: the Thinker's token embeddings.
            positions_N: positions that each recording takes; what is beyond stays at the end.
        """
        with torch.autocast(log_probs_NSV.device.type, enabled=False):
            speaks_NS = speaking(log_probs_NSV)
            heard_NSD = log_probs_NSV.exp() @ self.symbols(embeddings_VD)
            heard_NSD = torch.where(speaks_NS[..., None], heard_NSD, self.blank_D.float())
            within_NS = padding_mask(positions_N, heard_NSD.shape[1])
            order_NS = torch.where(within_NS, speaks_NS.long(), 2).argsort(dim=1, stable=True)
            return heard_NSD.gather(1, order_NS[..., None].expand_as(heard_NSD))


def transcript_loss_sum(
    log_probs_NSV: torch.Tensor, positions_N: torch.Tensor, tokens_NS: torch.Tensor, num_tokens_N: torch.Tensor
) -> torch.Tensor:
    """CTC loss of the recordings' transcripts, summed over the recordings that have one.

    Args:
        log_probs_NSV: of all recordings, padded.
        positions_N: positions that each recording takes.
        tokens_NS: transcripts, padded.
        num_tokens_N: tokens of each; 0 where there is no transcript, or none that fits into the positions.
    """
    known_N = num_tokens_N > 0
    if not bool(known_N.any()):
        return log_probs_NSV.new_zeros(())
    return ctc_sum(log_probs_NSV[known_N], tokens_NS[known_N] + 1, positions_N[known_N], num_tokens_N[known_N])


def read_tokens(log_probs_NSV: torch.Tensor, positions_N: torch.Tensor) -> list[list[int]]:
    """The most probable transcript of each recording, position by position: its tokens."""
    symbols_NS, speaks_NS = log_probs_NSV.argmax(-1), speaking(log_probs_NSV)
    within_NS = padding_mask(positions_N, symbols_NS.shape[1])
    return [(row[keep] - 1).tolist() for row, keep in zip(symbols_NS, speaks_NS & within_NS, strict=True)]


def speaking(log_probs_NSV: torch.Tensor) -> torch.Tensor:
    """Which positions say a token [N, S]: the most probable symbol is neither blank nor that of the one before."""
    symbols_NS = log_probs_NSV.argmax(-1)
    return (symbols_NS != 0) & (symbols_NS != F.pad(symbols_NS, (1, 0))[:, :-1])
