"""Residual vector quantization (Lee et al., 2022; Zeghidour et al., 2021): a vector becomes a few codes.

Each codebook quantizes what the ones before it left over. Codebooks are not trained by gradient: they follow a moving
average of the vectors assigned to them (van den Oord et al., 2017), start from k-means over the first batch, and a code
that nobody uses any more is put where vectors are. Of several ranks the first does all of this with the vectors of
the whole batch, so that all hold the codebooks that one rank would. The encoder gets its gradient straight through the
quantizer, and a commitment loss keeps its outputs near the codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from omni import ranks
from omni.config import Problem


@dataclass(frozen=True)
class QuantizerConfig:
    """Shape of a residual quantizer."""

    num_codebooks: int = 2
    codebook_size: int = 512
    dim: int = 64
    decay: float = 0.95  # of the moving average; the few hundred updates of a small run need a short memory
    revive_below: float = 0.3  # a code with less than this share of an even load is dead
    codebook_dropout: float = 0.5  # share of samples trained with fewer codebooks, where there are more than two

    @property
    def bits_per_frame(self) -> float:
        """Bits that the codes of one frame carry at most."""
        return self.num_codebooks * math.log2(self.codebook_size)

    def problems(self) -> Iterator[Problem]:
        """Settings that cannot work."""
        if not 1 <= self.num_codebooks <= 8:
            yield Problem("num_codebooks", str(self.num_codebooks), "from 1 to 8")
        if self.codebook_size < 2:
            yield Problem("codebook_size", str(self.codebook_size), "at least 2")
        if not 0 < self.decay < 1:
            yield Problem("decay", str(self.decay), "a share between 0 and 1")


@dataclass
class Quantized:
    """What quantization gives.

    Attributes:
        vectors_BTD: the quantized vectors, with the gradient passed straight through to the input.
        codes_BTK: the codes.
        commitment_sum: squared distance between the input and its codes, mean over dimensions and codebooks, summed
            over positions.
    """

    vectors_BTD: torch.Tensor
    codes_BTK: torch.Tensor
    commitment_sum: torch.Tensor


class ResidualQuantizer(nn.Module):
    """``num_codebooks`` codebooks, each for what is left of the vector after the ones before it.

    In training, :meth:`forward` only gathers statistics; :meth:`update` applies them, once for each accepted
    update of the encoder, so that accumulated micro-batches count together, and :meth:`discard` drops them.
    """

    codebooks_KVD: torch.Tensor
    load_KV: torch.Tensor
    sum_KVD: torch.Tensor
    started_K: torch.Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_codebooks, config.codebook_size)
        self.register_buffer("codebooks_KVD", torch.randn(*shape, config.dim) / math.sqrt(config.dim))
        self.register_buffer("load_KV", torch.ones(shape))  # moving average of vectors a code got in an update
        self.register_buffer("sum_KVD", torch.zeros(*shape, config.dim))  # ... and of their sum
        self.register_buffer("started_K", torch.zeros(config.num_codebooks, dtype=torch.bool))
        # of each micro-batch, of each codebook: vectors [B, T, D], their codes [B, T], which of them count [B, T]
        self._gathered: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = []

    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor | None = None) -> Quantized:
        """Quantize vectors [B, T, D]; positions that are not valid are quantized but neither counted nor learned.

        Raises:
            FloatingPointError: in training, when the vectors are not finite.
        """
        with torch.autocast(x_BTD.device.type, enabled=False):
            return self._quantize(x_BTD.float(), valid_BT)

    def _quantize(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor | None) -> Quantized:
        B, T, _ = x_BTD.shape
        valid = torch.ones(B, T, dtype=torch.bool, device=x_BTD.device) if valid_BT is None else valid_BT
        if self.training and not bool(torch.isfinite(x_BTD).all()):
            raise FloatingPointError("the codec's vectors are not finite")
        depth_B = self._depths(B, x_BTD.device)
        residual, total = x_BTD, torch.zeros_like(x_BTD)
        found, gathered = [], []
        commitment = x_BTD.new_zeros(())
        for k in range(self.config.num_codebooks):
            active_BT = valid & (depth_B > k)[:, None]
            if self.training:
                self._start(k, residual.detach(), active_BT)
            codes_BT = self.nearest(residual.detach(), k)
            chosen_BTD = F.embedding(codes_BT, self.codebooks_KVD[k])
            if self.training:
                gathered.append((residual.detach(), codes_BT, active_BT))
            share = active_BT.float() / self.config.num_codebooks
            commitment = commitment + ((residual - chosen_BTD).square().mean(-1) * share).sum()
            step_BTD = chosen_BTD * active_BT[:, :, None]
            residual, total = residual - step_BTD, total + step_BTD
            found.append(codes_BT)
        if self.training:
            self._gathered.append(gathered)
        return Quantized(x_BTD + (total - x_BTD).detach(), torch.stack(found, dim=-1), commitment)

    def _depths(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Codebooks that each sample uses: all, or in training for some samples fewer (SoundStream's dropout)."""
        most = self.config.num_codebooks
        depth_B = torch.full((batch_size,), most, device=device)
        if not self.training or most <= 2 or self.config.codebook_dropout == 0:
            return depth_B
        fewer = torch.randint(1, most, (batch_size,), device=device)
        return torch.where(torch.rand(batch_size, device=device) < self.config.codebook_dropout, fewer, depth_B)

    def nearest(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """Index of the nearest code of codebook ``k`` for vectors [..., D]."""
        codebook_VD = self.codebooks_KVD[k]
        # |x|^2 is the same for every code
        return (codebook_VD.square().sum(-1) - 2 * x @ codebook_VD.T).argmin(-1)

    def decode(self, codes_BTK: torch.Tensor) -> torch.Tensor:
        """Vectors [B, T, D] of codes; fewer codebooks than the configuration's may be given."""
        parts = [F.embedding(codes_BTK[..., k], self.codebooks_KVD[k]) for k in range(codes_BTK.shape[-1])]
        return torch.stack(parts).sum(0)

    # ---- learning ----

    @torch.no_grad()
    def _start(self, k: int, vectors_BTD: torch.Tensor, active_BT: torch.Tensor) -> None:
        """K-means over the first batch that reaches codebook ``k``."""
        if bool(self.started_K[k]):
            return
        vectors_ND = ranks.whole_batch(vectors_BTD)[ranks.whole_batch(active_BT)]
        if len(vectors_ND) == 0:
            return
        if ranks.rank() == 0:
            codebook_VD, load_V = kmeans(vectors_ND, self.config.codebook_size)
            self.codebooks_KVD[k], self.load_KV[k] = codebook_VD, load_V
            self.sum_KVD[k] = codebook_VD * load_V[:, None]
        self.started_K[k] = True
        ranks.from_first(self.codebooks_KVD[k], self.load_KV[k], self.sum_KVD[k])

    @torch.no_grad()
    def update(self) -> None:
        """Move the codebooks towards the vectors gathered since the last update, and revive dead codes."""
        gathered, self._gathered = self._gathered, []
        for k in range(self.config.num_codebooks if gathered else 0):
            # [vectors, codes, active] of every micro-batch
            whole = [[ranks.whole_batch(part) for part in batch[k]] for batch in gathered]
            vectors_ND = torch.cat([vectors_BTD[active_BT] for vectors_BTD, _, active_BT in whole])
            codes_N = torch.cat([codes_BT[active_BT] for _, codes_BT, active_BT in whole])
            if len(codes_N) and ranks.rank() == 0:
                self._move(k, vectors_ND, codes_N)
        ranks.from_first(self.codebooks_KVD, self.load_KV, self.sum_KVD)

    def _move(self, k: int, vectors_ND: torch.Tensor, codes_N: torch.Tensor) -> None:
        """Update one codebook."""
        size, decay = self.config.codebook_size, self.config.decay
        count_V = torch.bincount(codes_N, minlength=size).to(vectors_ND.dtype)
        sum_VD = torch.zeros_like(self.sum_KVD[k]).index_add_(0, codes_N, vectors_ND)
        self.load_KV[k].lerp_(count_V, 1 - decay)
        self.sum_KVD[k].lerp_(sum_VD, 1 - decay)
        dead_V = self.load_KV[k] < self.config.revive_below * len(codes_N) / size
        self.codebooks_KVD[k] = torch.where(
            dead_V[:, None], self.codebooks_KVD[k], self.sum_KVD[k] / self.load_KV[k][:, None].clamp(min=1e-6)
        )
        self._revive(k, dead_V, vectors_ND, len(codes_N) / size)

    def _revive(self, k: int, dead_V: torch.Tensor, vectors_ND: torch.Tensor, even_load: float) -> None:
        """Put dead codes onto vectors of the batch that are far from their code, with an even load to begin with."""
        num_dead = int(dead_V.sum())
        if num_dead == 0:
            return
        distances_N = (vectors_ND - self.codebooks_KVD[k][self.nearest(vectors_ND, k)]).square().sum(-1)
        # drawn in proportion to the squared distance (k-means++): several on one spot would die again
        picks = torch.multinomial(distances_N + 1e-9, num_dead, replacement=num_dead > len(vectors_ND))
        self.codebooks_KVD[k][dead_V] = vectors_ND[picks]
        self.load_KV[k][dead_V] = even_load
        self.sum_KVD[k][dead_V] = vectors_ND[picks] * even_load

    def discard(self) -> None:
        """Forget what was gathered: the batch was skipped."""
        self._gathered = []


@torch.no_grad()
def kmeans(vectors_ND: torch.Tensor, num_centres: int, rounds: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm: centres [V, D] and how many vectors each got [V]; torch's random numbers choose the start."""
    size = len(vectors_ND)
    order = torch.randperm(size, device=vectors_ND.device)
    picks = order.repeat(-(-num_centres // size))[:num_centres]
    # copies of one vector must not stay on one spot, so that a later update can tell them apart
    centres_VD = vectors_ND[picks] + 1e-4 * torch.randn(num_centres, vectors_ND.shape[1], device=vectors_ND.device)
    for _ in range(rounds):
        nearest_N = (centres_VD.square().sum(-1) - 2 * vectors_ND @ centres_VD.T).argmin(-1)
        count_V = torch.bincount(nearest_N, minlength=num_centres).to(vectors_ND.dtype)
        sums_VD = torch.zeros_like(centres_VD).index_add_(0, nearest_N, vectors_ND)
        centres_VD = torch.where(count_V[:, None] > 0, sums_VD / count_V[:, None].clamp(min=1), centres_VD)
    return centres_VD, count_V


@torch.no_grad()
def neighbour_shares(codebooks_KVD: torch.Tensor, blur: float) -> torch.Tensor:
    """For every code the share [K, V, V] of each code of its book in a blurred target: a softmax over distances.

    A model that is told that a frame's neighbours in sound are nearly as right learns from each frame about many codes.
    ``blur`` is in units of the (squared, median) distance from a code to the nearest other one.
    """
    size = codebooks_KVD.shape[1]
    distances_KVV = torch.cdist(codebooks_KVD, codebooks_KVD).square()
    others_KVV = distances_KVV + torch.eye(size, device=codebooks_KVD.device) * distances_KVV.max().clamp(min=1)
    nearest_K = others_KVV.amin(-1).median(-1).values.clamp(min=1e-9)
    return (-distances_KVV / (blur * nearest_K[:, None, None])).softmax(-1)


def code_usage(codes_NK: torch.Tensor, codebook_size: int) -> tuple[list[float], list[float]]:
    """Share of each codebook's codes that occur, and the perplexity of their distribution (at most the size)."""
    usage, perplexity = [], []
    for codes_N in codes_NK.reshape(-1, codes_NK.shape[-1]).unbind(-1):
        share_V = torch.bincount(codes_N, minlength=codebook_size).double() / max(1, len(codes_N))
        usage.append(float((share_V > 0).double().mean()))
        perplexity.append(float(torch.exp(-(share_V * share_V.clamp(min=1e-12).log()).sum())))
    return usage, perplexity
