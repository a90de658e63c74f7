"""The Talker's loop: from the units of sentences to codes, one code frame after the other, many sentences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omni.models.kv_cache import KVCache
from omni.models.talker import Talker
from omni.sampling import GREEDY, Chances, Sampling, choose
from omni.timing import FramePlan, TalkerText, plan_batch, plan_frames, round_durations, unit_symbols

# Of the code probabilities in a frame's mean vector. Character error rate of nano, 100 sentences, one model: the most
# probable codes 0.069, means at 0.5 0.054, at 0.7 0.057, at 0.85 0.060
_MEAN_TEMPERATURE = 0.5


@dataclass
class Written:
    """What the Talker wrote.

    Attributes:
        codes_TK: its codes.
        vectors_TD: the vectors that the codec shall decode. Where codes are drawn, theirs; at temperature 0 the mean of
            all codes' vectors by their probabilities: between two codes that are as likely, speech lies between them.
    """

    codes_TK: torch.Tensor
    vectors_TD: torch.Tensor


class WindowCache(KVCache):
    """Keys and values of the last ``window`` frames, in memory that is reserved once.

    Appending to a tensor copies all of it: measured, that was most of the time of a batch of sentences. Rows whose
    sentence is over are left out from the end of the batch.
    """

    def __init__(self, num_layers: int, window: int) -> None:
        super().__init__(num_layers)
        self.window = window
        self._frames: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._filled = [0] * num_layers

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values [B, H, 1, d] of one frame; returns those that it may see."""
        reserved = self._frames[layer]
        if reserved is None:
            B, H, _, d = k.shape
            reserved = k.new_empty(B, H, 4 * self.window, d), v.new_empty(B, H, 4 * self.window, d)
            self._frames[layer] = reserved
        keys, values = reserved
        rows, at = len(k), self._filled[layer]
        if at == keys.shape[2]:  # full: what can still be seen moves to the front
            for kept in reserved:
                kept[:rows, :, : self.window] = kept[:rows, :, -self.window :].clone()
            at = self.window
        keys[:rows, :, at : at + 1], values[:rows, :, at : at + 1] = k, v
        self._filled[layer] = at + 1
        first = max(0, at + 1 - self.window)
        return keys[:rows, :, first : at + 1], values[:rows, :, first : at + 1]


class CodeWriter:
    """The Talker's loop: one code frame after the other, for a batch of sentences.

    Args:
        talker: in evaluation mode.
        codebooks_KVD: the codec's.
        sampling: how codes are drawn.
        keys: a number for each sentence; with the seed it decides what is drawn.
    """

    def __init__(self, talker: Talker, codebooks_KVD: torch.Tensor, sampling: Sampling, keys: Sequence[int]) -> None:
        self.talker, self.codebooks_KVD, self.sampling = talker, codebooks_KVD, sampling
        self._chances = Chances(sampling, keys)
        self._cache = WindowCache(len(talker.blocks), talker.config.window)
        self._previous_BK = torch.full(
            (len(keys), talker.num_codebooks), talker.codebook_size, device=codebooks_KVD.device
        )
        self.num_frames = 0

    @torch.no_grad()
    def write(self, condition_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next frame of the first rows: codes [B, K], vectors [B, D], and where the Talker would stop after it."""
        rows, talker = len(condition_BD), self.talker
        previous_B1K = self._previous_BK[:rows, None]
        h = talker.states(condition_BD[:, None], previous_B1K, self._cache, start=self.num_frames)[:, 0]
        frame: list[torch.Tensor] = []
        vectors_BD = condition_BD.new_zeros(rows, self.codebooks_KVD.shape[2])
        for k, codebook_VD in enumerate(self.codebooks_KVD):
            logits_BV = talker.residual_logits(h, torch.stack(frame, dim=-1), k) if k else talker.base_head(h)
            frame.append(choose(logits_BV, self.sampling, self._chances.next(rows)))
            if self.sampling.temperature > 0:
                vectors_BD = vectors_BD + codebook_VD[frame[-1]]
            else:
                vectors_BD = vectors_BD + (logits_BV.float() / _MEAN_TEMPERATURE).softmax(-1) @ codebook_VD
        self._previous_BK = torch.stack(frame, dim=-1)
        self.num_frames += 1
        return self._previous_BK, vectors_BD, talker.stop_head(h).squeeze(-1) > 0


@torch.no_grad()
def generate_codes(
    talker: Talker,
    codebooks_KVD: torch.Tensor,
    texts: Sequence[Sequence[str]],
    speaker_BE: torch.Tensor,
    states: Sequence[torch.Tensor | None] | None = None,
    sampling: Sampling = GREEDY,
    speed: float = 1.0,
    keys: Sequence[int] | None = None,
    durations: Sequence[torch.Tensor] | None = None,
) -> list[Written]:
    """Codes of several sentences.

    Args:
        talker: in evaluation mode.
        codebooks_KVD: the codec's.
        texts: units of each sentence (:func:`omni.speech_text.units`).
        speaker_BE: speaker embeddings.
        states: the Thinker's states [U, D] for each sentence's units; None where there are none.
        sampling: how codes are drawn.
        speed: 2.0 halves every duration.
        keys: see :class:`CodeWriter`; by default 0 for every sentence.
        durations: code frames of each sentence's units; predicted from the text unless given.
    """
    text = talker_text(talker, texts, speaker_BE, states)
    encoded_BCD = talker.encode_text(text)
    if durations is None:
        durations = whole_durations(talker, encoded_BCD, text, [len(row) for row in texts], speed)
    condition_BTD, total_B = conditions(talker, encoded_BCD, text, texts, durations)
    # where the pause after the last word begins: the Talker may stop from there on
    end_B = torch.tensor([int(frames_U[:-1].sum()) for frames_U in durations])
    order = total_B.argsort(descending=True, stable=True)
    writer = CodeWriter(talker, codebooks_KVD, sampling, [keys[index] if keys else 0 for index in order.tolist()])
    written = _write_all(writer, condition_BTD[order.to(condition_BTD.device)], total_B[order], end_B[order])
    return [written[row] for row in order.argsort().tolist()]


def talker_text(
    talker: Talker,
    texts: Sequence[Sequence[str]],
    speaker_BE: torch.Tensor,
    states: Sequence[torch.Tensor | None] | None,
) -> TalkerText:
    """The units of several sentences as tensors, where the Talker is."""
    device = speaker_BE.device
    symbols_BC, unit_BC = unit_symbols(texts)
    return TalkerText(symbols_BC.to(device), unit_BC.to(device), speaker_BE, *_pad_states(talker, texts, states))


def whole_durations(
    talker: Talker, encoded_BCD: torch.Tensor, text: TalkerText, num_units: Sequence[int], speed: float
) -> list[torch.Tensor]:
    """Predicted durations [U] of each sentence in whole code frames; units are pauses and words in turn."""
    frames_BU = talker.durations(encoded_BCD, text, max(num_units)).cpu() / speed
    return [
        round_durations(frames_U[:number], torch.arange(number) % 2 == 1)
        for frames_U, number in zip(frames_BU, num_units, strict=True)
    ]


def conditions(
    talker: Talker,
    encoded_BCD: torch.Tensor,
    text: TalkerText,
    texts: Sequence[Sequence[str]],
    durations: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each frame [B, T, D] is to be, and the number of frames of each sentence."""
    device = encoded_BCD.device
    sizes = [torch.tensor([len(unit) for unit in row]) for row in texts]
    plan = plan_batch([plan_frames(*pair) for pair in zip(sizes, durations, strict=True)])
    placed = FramePlan(plan.character_BT.to(device), plan.place_BTJ.to(device), plan.num_frames_B)
    return talker.condition(encoded_BCD, text, placed), plan.num_frames_B


def _write_all(
    writer: CodeWriter, condition_BTD: torch.Tensor, total_B: torch.Tensor, end_B: torch.Tensor
) -> list[Written]:
    """Codes of every row; the longest come first, so that those that are over drop off the end."""
    (B, T), (K, _, D) = condition_BTD.shape[:2], writer.codebooks_KVD.shape
    codes_BTK = torch.zeros(B, T, K, dtype=torch.long, device=condition_BTD.device)
    vectors_BTD = condition_BTD.new_zeros(B, T, D)
    last_B = total_B.clone()
    for t in range(T):
        rows = int((last_B > t).nonzero().max()) + 1 if bool((last_B > t).any()) else 0
        if rows == 0:
            break
        codes_BTK[:rows, t], vectors_BTD[:rows, t], stops_B = writer.write(condition_BTD[:rows, t])
        stops_B = stops_B.cpu() & (t >= end_B[:rows])
        last_B[:rows] = torch.where(stops_B, last_B[:rows].clamp(max=t + 1), last_B[:rows])
    return [Written(codes_BTK[row, :last], vectors_BTD[row, :last]) for row, last in enumerate(last_B.tolist())]


def _pad_states(
    talker: Talker, texts: Sequence[Sequence[str]], states: Sequence[torch.Tensor | None] | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """States of all sentences as one tensor, and which sentences have any."""
    dim = talker.config.state_dim
    if states is None or dim == 0 or all(item is None for item in states):
        return None, None
    device = talker.base_head.weight.device
    padded = torch.zeros(len(texts), max(len(row) for row in texts), dim, device=device)
    for row, item in enumerate(states):
        if item is not None:
            padded[row, : len(item)] = item.to(device)
    return padded, torch.tensor([item is not None for item in states], device=device)
