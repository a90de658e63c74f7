"""The Talker: text, a speaker and the Thinker's states to codes, one code frame after the other.

Timing comes first: from the text alone a duration is predicted for every word and every pause. A word's frames are then
spread evenly over its characters, and each frame is written by a causal transformer that sees the encoding of its
character, the frame's place in the word, the speaker, and the frames before it. Words are good units of time where
characters are not (silent letters; an aligner's spiky onsets).
"""

from __future__ import annotations

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
    RotaryPositions,
    TimeConv,
    check_finite,
    init_weights,
    padding_mask,
    scale_residual_outputs,
)
from omni.models.one_position import run_block
from omni.timing import NUM_PLACE_FEATURES, FramePlan, TalkerText
from omni.tokenizer import Characters


@dataclass(frozen=True)
class TalkerConfig:
    """Shape of a Talker. What depends on other parts (codes, speaker, states) is filled in when it is built."""

    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    hidden_dim: int = 768
    text_layers: int = 3  # convolutions over the characters
    text_kernel: int = 5
    window: int = 64  # frames back that a frame attends to (2 s): speech of any length, in constant memory
    dropout: float = 0.1
    corrupt_previous: float = 0.15  # share of previous codes replaced at random in training
    drop_states: float = 0.4  # share of samples trained without the Thinker's states
    num_codebooks: int = 0  # of the codec's that the Talker writes; 0: all
    target_blur: float = 0.5  # how far a code's share in the targets reaches to codes that sound like it; 0: not at all
    state_dim: int = 0  # of the Thinker's states; 0: none

    def problems(self) -> Iterator[Problem]:
        """Shapes that cannot be built."""
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            yield Problem("dim", f"{self.dim} with {self.num_heads} heads", "an even multiple of num_heads")
        if self.text_kernel % 2 == 0:
            yield Problem("text_kernel", str(self.text_kernel), "an odd width")
        for key in ("corrupt_previous", "drop_states"):
            if not 0 <= getattr(self, key) <= 1:
                yield Problem(key, str(getattr(self, key)), "a share from 0 to 1")
        if self.target_blur < 0:
            yield Problem("target_blur", str(self.target_blur), "0 or more")
        if self.window < 1:
            yield Problem("window", str(self.window), "at least 1")

    @property
    def look_ahead(self) -> int:
        """Characters that a frame's condition sees beyond its own."""
        return self.text_layers * (self.text_kernel // 2)


@dataclass
class TalkerOutput:
    """Teacher-forced predictions.

    Attributes:
        logits_BTKV: of each codebook's code, given the codes of the frames before and the codebooks before.
        stop_BT: logit of "this is the last frame".
    """

    logits_BTKV: torch.Tensor
    stop_BT: torch.Tensor


class Talker(nn.Module):
    """Character encoder with word durations, causal transformer over code frames, depth head for residual codes."""

    def __init__(self, config: TalkerConfig, num_codebooks: int, codebook_size: int, speaker_dim: int) -> None:
        super().__init__()
        self.config, self.num_codebooks, self.codebook_size = config, num_codebooks, codebook_size
        dim = config.dim
        self.characters = nn.Embedding(Characters.size, dim)
        self.speaker_proj = nn.Linear(speaker_dim, dim)
        states = [RMSNorm(config.state_dim), nn.Linear(config.state_dim, dim, bias=False)] if config.state_dim else []
        self.state_proj = nn.Sequential(*states)
        self.text_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(config.text_layers))
        self.text_convolutions = nn.ModuleList(
            TimeConv(dim, dim, config.text_kernel, padding=config.text_kernel // 2) for _ in range(config.text_layers)
        )
        self.duration_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))
        self.text_proj = nn.Linear(dim, dim)
        self.place_proj = nn.Sequential(nn.Linear(NUM_PLACE_FEATURES, dim), nn.GELU(), nn.Linear(dim, dim))
        # the last index stands for "no frame yet"
        self.previous = nn.ModuleList(nn.Embedding(codebook_size + 1, dim) for _ in range(num_codebooks))
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.hidden_dim, layer, causal=True, dropout=config.dropout)
            for layer in range(config.num_layers)
        )
        self.rotary = RotaryPositions(dim // config.num_heads)
        self.norm = RMSNorm(dim)
        self.base_head = nn.Linear(dim, codebook_size)
        self.stop_head = nn.Linear(dim, 1)
        self.depth_codes = nn.ModuleList(nn.Embedding(codebook_size, dim) for _ in range(num_codebooks - 1))
        self.depth_heads = nn.ModuleList(
            nn.Sequential(RMSNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, codebook_size))
            for _ in range(num_codebooks - 1)
        )
        init_weights(self)
        for embedding in (part for part in self.modules() if isinstance(part, nn.Embedding)):
            nn.init.normal_(embedding.weight, std=0.1)
        nn.init.normal_(self.speaker_proj.weight, std=0.5)  # of unit vectors: entries are small
        scale_residual_outputs(self.blocks)

    # ---- text and timing ----

    def encode_text(self, text: TalkerText) -> torch.Tensor:
        """Encodings [B, C, D] of the characters, from each one's neighbourhood, its word's state and the speaker."""
        valid_BC1 = (text.symbols_BC != Characters.pad)[:, :, None]
        x = self.characters(text.symbols_BC) + self.speaker_proj(text.speaker_BE)[:, None]
        if text.states_BUD is not None and self.config.state_dim:
            x = x + self._state_share(text)
        for norm, convolution in zip(self.text_norms, self.text_convolutions, strict=True):
            h = norm(x) * valid_BC1
            x = x + F.gelu(convolution(h))
        return x

    def _state_share(self, text: TalkerText) -> torch.Tensor:
        """What the states add to the characters' embeddings; nothing for rows without states."""
        assert text.states_BUD is not None
        has_B = torch.ones(len(text.symbols_BC), dtype=torch.bool, device=text.symbols_BC.device)
        if text.has_states_B is not None:
            has_B = text.has_states_B
        if self.training:
            has_B = has_B & (torch.rand(len(has_B), device=has_B.device) >= self.config.drop_states)
        share_BUD = self.state_proj(text.states_BUD) * has_B[:, None, None]
        share_BUD = F.pad(share_BUD, (0, 0, 0, 1))  # nothing for padding, which points behind the last unit
        unit_BC = text.unit_BC.clamp(max=share_BUD.shape[1] - 1)
        return share_BUD.gather(1, unit_BC[:, :, None].expand(-1, -1, share_BUD.shape[2]))

    def durations(self, encoded_BCD: torch.Tensor, text: TalkerText, num_units: int) -> torch.Tensor:
        """Predicted frames [B, U] of every unit: each of its characters adds a positive share."""
        # about two frames a character to begin with
        share_BC = F.softplus(self.duration_head(encoded_BCD).squeeze(-1).float() + 2)
        share_BC = share_BC * (text.symbols_BC != Characters.pad)
        total = torch.zeros(len(share_BC), num_units + 1, device=share_BC.device)
        return total.scatter_add(1, text.unit_BC.clamp(max=num_units), share_BC)[:, :num_units]

    # ---- frames ----

    def condition(self, encoded_BCD: torch.Tensor, text: TalkerText, plan: FramePlan) -> torch.Tensor:
        """What each frame [B, T, D] is to be, before it sees any other frame."""
        index = plan.character_BT[:, :, None].expand(-1, -1, encoded_BCD.shape[2])
        spoken_BTD = self.text_proj(encoded_BCD).gather(1, index)
        return spoken_BTD + self.place_proj(plan.place_BTJ) + self.speaker_proj(text.speaker_BE)[:, None]

    def states(
        self,
        condition_BTD: torch.Tensor,
        previous_BTK: torch.Tensor,
        cache: KVCache | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """Hidden states of frames from ``start`` on, given the codes of the frame before each one."""
        T = condition_BTD.shape[1]
        x = condition_BTD + sum(table(previous_BTK[..., k]) for k, table in enumerate(self.previous))
        positions_T = torch.arange(start, start + T, device=x.device)
        mask = None
        if cache is None and self.config.window < T:
            back = positions_T[:, None] - positions_T[None, :]
            mask = ((back >= 0) & (back < self.config.window))[None, None]
        rotary = self.rotary(positions_T[None])
        for block in self.blocks:
            x = run_block(block, x, rotary, mask, cache)
        return self.norm(x)

    def residual_logits(self, h: torch.Tensor, codes: torch.Tensor, k: int) -> torch.Tensor:
        """Logits [..., V] of codebook ``k`` > 0, given the states and the frame's codes [..., >= k] before it."""
        for number in range(k):
            h = h + self.depth_codes[number](codes[..., number])
        return self.depth_heads[k - 1](h)

    def forward(
        self, encoded_BCD: torch.Tensor, text: TalkerText, plan: FramePlan, codes_BTK: torch.Tensor
    ) -> TalkerOutput:
        """Predict every frame from the true ones before it; in training some of those are replaced at random.

        Raises:
            FloatingPointError: when the logits are not finite.
        """
        previous_BTK = self.shift(codes_BTK)
        if self.training and self.config.corrupt_previous:
            noise = torch.randint_like(previous_BTK, self.codebook_size)
            hit = torch.rand(previous_BTK.shape[:2], device=noise.device) < self.config.corrupt_previous
            previous_BTK = torch.where(hit[:, :, None], noise, previous_BTK)
        h = self.states(self.condition(encoded_BCD, text, plan), previous_BTK)
        logits = [self.base_head(h)]
        logits += [self.residual_logits(h, codes_BTK, k) for k in range(1, self.num_codebooks)]
        stacked = torch.stack(logits, dim=2)
        check_finite(stacked, "the Talker's logits")
        return TalkerOutput(stacked, self.stop_head(h).squeeze(-1))

    def shift(self, codes_BTK: torch.Tensor) -> torch.Tensor:
        """The codes of the frame before each frame; before the first there is none."""
        return F.pad(codes_BTK[:, :-1], (0, 0, 1, 0), value=self.codebook_size)


@dataclass
class TalkerLosses:
    """Sums over targets: codes (mean over codebooks) over frames, stop over frames, durations over units."""

    codes: torch.Tensor
    stop: torch.Tensor
    durations: torch.Tensor
    right_K: torch.Tensor  # correct codes of each codebook


def talker_losses(
    talker: Talker,
    text: TalkerText,
    plan: FramePlan,
    codes_BTK: torch.Tensor,
    durations_BU: torch.Tensor,
    shares_KVV: torch.Tensor | None = None,
) -> TalkerLosses:
    """The Talker's losses on true codes and durations; -1 in ``durations_BU`` is padding.

    Args:
        talker: the Talker.
        text: what is spoken.
        plan: when.
        codes_BTK: the recordings' codes.
        durations_BU: code frames of each unit.
        shares_KVV: the targets' distribution for each code (:func:`omni.models.quantizer.neighbour_shares`); None: the
            code alone.
    """
    encoded_BCD = talker.encode_text(text)
    known = durations_BU >= 0
    predicted = talker.durations(encoded_BCD, text, durations_BU.shape[1])
    # plus one frame: pauses are mostly of no length, and of words the error shall count in proportion
    gaps = (predicted[known] + 1).log() - (durations_BU[known].float() + 1).log()
    output = talker(encoded_BCD, text, plan, codes_BTK)
    valid_BT = padding_mask(plan.num_frames_B, codes_BTK.shape[1])
    logits, targets = output.logits_BTKV[valid_BT].float(), codes_BTK[valid_BT]
    if shares_KVV is None:
        codes = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / talker.num_codebooks
    else:
        log_probs = logits.log_softmax(-1).unbind(1)
        terms = [(shares_KVV[k][targets[:, k]] * found).sum() for k, found in enumerate(log_probs)]
        codes = -torch.stack(terms).sum() / talker.num_codebooks
    positions = torch.arange(codes_BTK.shape[1], device=codes_BTK.device)
    last_BT = (positions[None] == plan.num_frames_B[:, None] - 1).float()
    # one frame in a hundred is the last: it weighs as much as ten others
    stop = F.binary_cross_entropy_with_logits(
        output.stop_BT.float()[valid_BT], last_BT[valid_BT], reduction="sum", pos_weight=last_BT.new_tensor(10.0)
    )
    right_K = (logits.argmax(-1) == targets).sum(0)
    return TalkerLosses(codes, stop, gaps.abs().sum(), right_K)
