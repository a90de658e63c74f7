"""From text to sound: durations, codes, log-mel frames, waveforms, many sentences at once.

Everything is predicted from the text, the speaker's embedding and, if given, the Thinker's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omni.audio import SILENCE
from omni.models.layers import KVCache
from omni.models.speech import SpeechModel
from omni.models.talker import Talker
from omni.models.thinker import Thinker
from omni.speech_text import SpokenWord, chunks, units
from omni.timing import FramePlan, TalkerText, plan_batch, plan_frames, round_durations, unit_symbols
from omni.tokenizer import Tokenizer, plain_text

_GAP_SECONDS = 0.15  # of silence between the chunks of a long text


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn. Temperature 0 takes the most probable code."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    speed: float = 1.0  # of speech; 2.0 halves every duration


GREEDY = Sampling()


@dataclass
class Spoken:
    """One text, spoken.

    Attributes:
        wave: samples.
        frames_FM: log-mel frames that the codec made of the codes.
        codes_TK: codes, of all chunks.
    """

    wave: torch.Tensor
    frames_FM: torch.Tensor
    codes_TK: torch.Tensor


class WindowCache(KVCache):
    """Keys and values in memory that is reserved once; a step sees the last ``window`` frames.

    Appending to a tensor copies all of it: measured, that was most of the time of a batch of sentences. Rows whose
    sentence is over can be dropped from the end of the batch with :meth:`keep`.
    """

    def __init__(self, num_layers: int, capacity: int, window: int) -> None:
        super().__init__(num_layers)
        self.capacity, self.window = capacity, window
        self._filled = [0] * num_layers

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values [B, H, 1, d] of one frame; returns those that it may see."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            B, H, _, d = k.shape
            keys, values = k.new_empty(B, H, self.capacity, d), v.new_empty(B, H, self.capacity, d)
            self.keys[layer], self.values[layer] = keys, values
        rows, at = len(k), self._filled[layer]
        keys[:rows, :, at : at + 1], values[:rows, :, at : at + 1] = k, v
        self._filled[layer] = at + 1
        first = max(0, at + 1 - self.window)
        return keys[:rows, :, first : at + 1], values[:rows, :, first : at + 1]


def draw(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> torch.Tensor:
    """One code for each row."""
    if sampling.temperature <= 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        least = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits_BV.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= sampling.top_p, float("-inf"))
        logits_BV = torch.empty_like(logits_BV).scatter_(1, order, ordered)
    return torch.multinomial(logits_BV.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits_BV.device)


@torch.no_grad()
def generate_codes(
    talker: Talker,
    texts: Sequence[Sequence[str]],
    speaker_BE: torch.Tensor,
    states: Sequence[torch.Tensor | None] | None = None,
    sampling: Sampling = GREEDY,
    durations: Sequence[torch.Tensor] | None = None,
    max_frames: int | None = None,
) -> list[torch.Tensor]:
    """Codes [T, K] of several sentences.

    Args:
        talker: in evaluation mode.
        texts: units of each sentence (:func:`omni.speech_text.units`).
        speaker_BE: speaker embeddings.
        states: the Thinker's states [U, D] for each sentence's units; None where there are none.
        sampling: how codes are drawn.
        durations: code frames of each sentence's units; predicted from the text unless given.
        max_frames: stop after this many.
    """
    device = speaker_BE.device
    symbols_BC, unit_BC = unit_symbols(texts)
    text = TalkerText(symbols_BC.to(device), unit_BC.to(device), speaker_BE, *_pad_states(talker, texts, states))
    encoded_BCD = talker.encode_text(text)
    if durations is None:
        most = max(len(row) for row in texts)
        durations = [
            round_durations(frames_U[: len(row)] / sampling.speed, torch.arange(len(row)) % 2 == 1)
            for frames_U, row in zip(talker.durations(encoded_BCD, text, most).cpu(), texts, strict=True)
        ]
    plan = plan_batch(
        [
            plan_frames(torch.tensor([len(unit) for unit in row]), frames_U)
            for row, frames_U in zip(texts, durations, strict=True)
        ]
    )
    plan = FramePlan(plan.character_BT.to(device), plan.place_BTJ.to(device), plan.num_frames_B)
    condition_BTD = talker.condition(encoded_BCD, text, plan)
    total_B = plan.num_frames_B if max_frames is None else plan.num_frames_B.clamp(max=max_frames)
    # where the pause after the last word begins: the Talker may stop from there on
    end_B = torch.tensor([int(frames_U[:-1].sum()) for frames_U in durations])
    return _decode(talker, condition_BTD, total_B, end_B, sampling)


def _decode(
    talker: Talker, condition_BTD: torch.Tensor, total_B: torch.Tensor, end_B: torch.Tensor, sampling: Sampling
) -> list[torch.Tensor]:
    """The loop over frames; the longest sentences come first, so that those that are over drop off the end."""
    device, longest = condition_BTD.device, int(total_B.max())
    order = total_B.argsort(descending=True, stable=True)
    condition_BTD, total_B, end_B = condition_BTD[order.to(device)], total_B[order], end_B[order]
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = WindowCache(len(talker.blocks), longest, talker.config.window)
    codes_BTK = torch.zeros(len(order), longest, talker.num_codebooks, dtype=torch.long, device=device)
    previous_BK = torch.full((len(order), talker.num_codebooks), talker.codebook_size, device=device)
    last_B = total_B.clone()
    for t in range(longest):
        rows = int((last_B > t).nonzero().max()) + 1 if bool((last_B > t).any()) else 0
        if rows == 0:
            break
        h = talker.states(condition_BTD[:rows, t : t + 1], previous_BK[:rows, None], cache, start=t)[:, 0]
        frame = [draw(talker.base_head(h), sampling, generator)]
        for k in range(1, talker.num_codebooks):
            frame.append(draw(talker.residual_logits(h, torch.stack(frame, dim=-1), k), sampling, generator))
        previous_BK = torch.stack(frame, dim=-1)
        codes_BTK[:rows, t] = previous_BK
        stops = (talker.stop_head(h).squeeze(-1) > 0).cpu() & (t >= end_B[:rows])
        last_B[:rows] = torch.where(stops, last_B[:rows].clamp(max=t + 1), last_B[:rows])
    result = [torch.empty(0)] * len(order)
    for row, index in enumerate(order.tolist()):
        result[index] = codes_BTK[row, : int(last_B[row])]
    return result


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


@torch.no_grad()
def render(model: SpeechModel, codes: Sequence[torch.Tensor], batch_size: int = 16) -> list[Spoken]:
    """Log-mel frames and waveforms of codes, batched by length."""
    order = sorted(range(len(codes)), key=lambda index: len(codes[index]))
    hop, result = model.config.mel.hop_length, {}
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        num_codes_B = torch.tensor([len(codes[index]) for index in picked], device=model.device)
        codes_BTK = torch.nn.utils.rnn.pad_sequence([codes[index] for index in picked], batch_first=True)
        frames_BFM = model.codec.decode(codes_BTK.to(model.device), num_codes_B)
        sizes = (num_codes_B * model.config.codec.reduction).tolist()
        for row, size in enumerate(sizes):
            frames_BFM[row, size:] = SILENCE
        wave_BS = model.waveforms(frames_BFM)
        for row, (index, size) in enumerate(zip(picked, sizes, strict=True)):
            result[index] = Spoken(wave_BS[row, : size * hop], frames_BFM[row, :size], codes[index])
    return [result[index] for index in range(len(codes))]


@torch.no_grad()
def embed_speakers(model: SpeechModel, references: Sequence[torch.Tensor], batch_size: int = 32) -> torch.Tensor:
    """Speaker embeddings [B, E] of recordings, given as log-mel frames [F, M]."""
    order = sorted(range(len(references)), key=lambda index: len(references[index]))
    result = torch.zeros(len(references), model.config.speaker.embedding_dim, device=model.device)
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        sizes_B = torch.tensor([len(references[index]) for index in picked], device=model.device)
        padded = torch.nn.utils.rnn.pad_sequence([references[index] for index in picked], batch_first=True)
        result[picked] = model.speaker(padded.to(model.device), sizes_B).float()
    return result


@torch.no_grad()
def word_states(
    thinker: Thinker,
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, Sequence[SpokenWord]]],
    layer: int,
    batch_size: int = 32,
) -> list[torch.Tensor]:
    """The Thinker's states [U, D] for the units of each text: of a word the state at its last token.

    A pause has the state of the word before it; the pause before the first word has the first token's.
    """
    tokens = [tokenizer.encode(plain_text(text))[: thinker.config.ctx_len] for text, _ in texts]
    order = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
    device, found = thinker.embed_tokens.weight.device, [torch.empty(0)] * len(texts)
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        # padded on the right, where no token looks
        rows = [torch.tensor(tokens[index]) for index in picked]
        tokens_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id).to(device)
        states_BTD = thinker(thinker.embed(tokens_BT), states_of=[layer]).hidden_states[layer]
        for index, states_TD in zip(picked, states_BTD, strict=True):
            sizes = [tokenizer.num_bytes(token) for token in tokens[index]]
            found[index] = states_at_words(states_TD[: len(sizes)], sizes, *texts[index])
    return found


def states_at_words(
    states_TD: torch.Tensor, token_bytes: Sequence[int], text: str, words: Sequence[SpokenWord]
) -> torch.Tensor:
    """States [U, D] of a text's units from those of its tokens, each of which stands for some of its bytes."""
    ends = torch.tensor(token_bytes).cumsum(0)
    wanted = torch.tensor([len(text[: word.end].encode()) for word in words])
    tokens = torch.searchsorted(ends, wanted).clamp(max=len(ends) - 1)
    return states_TD[torch.cat([tokens.new_zeros(1), tokens.repeat_interleave(2)]).to(states_TD.device)]


@torch.no_grad()
def speak(
    model: SpeechModel,
    texts: Sequence[str],
    speaker_BE: torch.Tensor,
    mind: tuple[Thinker, Tokenizer] | None = None,
    sampling: Sampling = GREEDY,
) -> list[Spoken]:
    """Speak texts, each in the voice of an embedding (:meth:`SpeechModel.voice`, :func:`embed_speakers`).

    Long texts are spoken in chunks of at most 30 words. With ``mind``, the Talker gets the Thinker's states.

    Raises:
        UserError: when a text holds nothing that can be spoken.
    """
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in chunks(text)]
    states = None
    if mind is not None and model.config.talker.state_dim:
        layer = model.config.thinker_layer
        states = word_states(*mind, [(texts[number], piece) for number, piece in pieces], layer)
    owners = torch.tensor([number for number, _ in pieces], device=speaker_BE.device)
    codes = generate_codes(model.talker, [units(piece) for _, piece in pieces], speaker_BE[owners], states, sampling)
    parts: list[list[Spoken]] = [[] for _ in texts]
    for (number, _), spoken in zip(pieces, render(model, codes), strict=True):
        parts[number].append(spoken)
    return [_join(model, part) for part in parts]


def _join(model: SpeechModel, parts: list[Spoken]) -> Spoken:
    """One utterance from chunks, with a short silence between them."""
    num_frames = round(_GAP_SECONDS * model.config.mel.frame_rate)
    waves, frames = [parts[0].wave], [parts[0].frames_FM]
    for part in parts[1:]:
        waves += [part.wave.new_zeros(num_frames * model.config.mel.hop_length), part.wave]
        frames += [part.frames_FM.new_full((num_frames, part.frames_FM.shape[1]), SILENCE), part.frames_FM]
    return Spoken(torch.cat(waves), torch.cat(frames), torch.cat([part.codes_TK for part in parts]))
