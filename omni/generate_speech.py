"""From text to sound: durations, codes, log-mel frames, waveforms, many sentences at once.

Everything is predicted from the text, the speaker's embedding and, if given, the Thinker's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omni.audio import SILENCE
from omni.generate_codes import Written, generate_codes
from omni.models.layers import padding_mask
from omni.models.speech import SpeechModel
from omni.models.thinker import Thinker
from omni.sampling import GREEDY, Sampling
from omni.speech_text import chunks, units
from omni.thinker_states import word_states
from omni.tokenizer import Tokenizer

Mind = tuple[Thinker, Tokenizer]  # what understands the text that is spoken
_GAP_SECONDS = 0.15  # of silence between the chunks of a long text


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


@torch.no_grad()
def render(model: SpeechModel, written: Sequence[Written], batch_size: int = 16) -> list[Spoken]:
    """Log-mel frames and waveforms of what the Talker wrote; frames are decoded in batches by length."""
    order = sorted(range(len(written)), key=lambda index: len(written[index].codes_TK))
    result = {}
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        sizes_B = torch.tensor([len(written[index].codes_TK) for index in picked], device=model.device)
        vectors_BTD = torch.nn.utils.rnn.pad_sequence([written[index].vectors_TD for index in picked], batch_first=True)
        frames_BFM = model.codec.render(vectors_BTD, padding_mask(sizes_B, vectors_BTD.shape[1])).float()
        for index, size, frames_FM in zip(picked, sizes_B.tolist(), frames_BFM, strict=True):
            frames_FM = frames_FM[: size * model.config.codec.reduction]
            result[index] = Spoken(model.waveforms(frames_FM[None])[0], frames_FM, written[index].codes_TK)
    return [result[index] for index in range(len(written))]


@torch.no_grad()
def embed_speakers(
    model: SpeechModel, references: Sequence[torch.Tensor], grade: bool = False, batch_size: int = 32
) -> torch.Tensor:
    """Speaker embeddings [B, E] of recordings, given as log-mel frames [F, M].

    ``grade``: by the speaker encoder that only grades; what it says must not condition the Talker.
    """
    encoder = model.grader if grade else model.speaker
    order = sorted(range(len(references)), key=lambda index: len(references[index]))
    result = torch.zeros(len(references), model.config.speaker.embedding_dim, device=model.device)
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        sizes_B = torch.tensor([len(references[index]) for index in picked], device=model.device)
        padded = torch.nn.utils.rnn.pad_sequence([references[index] for index in picked], batch_first=True)
        result[picked] = encoder(padded.to(model.device), sizes_B).float()
    return result


@torch.no_grad()
def speak(
    model: SpeechModel,
    texts: Sequence[str],
    speaker_BE: torch.Tensor,
    mind: Mind | None = None,
    sampling: Sampling = GREEDY,
    speed: float = 1.0,
) -> list[Spoken]:
    """Speak texts, each in the voice of an embedding (:meth:`SpeechModel.voice`, :func:`embed_speakers`).

    Long texts are spoken in chunks (:func:`omni.speech_text.chunks`). With ``mind``, the Talker gets the Thinker's
    states. A text sounds the same whatever texts stand beside it.

    Raises:
        UserError: when a text holds nothing that can be spoken.
    """
    if not texts:  # of a model whose answers are all empty, as they are at first
        return []
    pieces = [chunks(text) for text in texts]
    states: list[torch.Tensor | None] = []
    if mind is not None and model.config.talker.state_dim:
        whole = [(text, [word for piece in parts for word in piece]) for text, parts in zip(texts, pieces, strict=True)]
        for states_UD, parts in zip(word_states(*mind, whole, model.config.thinker_layer), pieces, strict=True):
            states += chunk_states(states_UD, [len(piece) for piece in parts])
    flat = [(owner, number, piece) for owner, parts in enumerate(pieces) for number, piece in enumerate(parts)]
    owners = torch.tensor([owner for owner, _, _ in flat], device=speaker_BE.device)
    written = generate_codes(
        model.talker, model.codebooks, [units(piece) for *_, piece in flat], speaker_BE[owners],
        states or None, sampling, speed, [number for _, number, _ in flat],
    )  # fmt: skip
    spoken: list[list[Spoken]] = [[] for _ in texts]
    for (owner, *_), part in zip(flat, render(model, written), strict=True):
        spoken[owner].append(part)
    return [_join(model, parts) for parts in spoken]


def chunk_states(states_UD: torch.Tensor, num_words: Sequence[int]) -> list[torch.Tensor]:
    """The states of each chunk's units from those of the whole text; the first pause has that of the word before it."""
    found, at = [], 0
    for number in num_words:
        found.append(states_UD[at : at + 2 * number + 1])
        at += 2 * number
    return found


def gap(model: SpeechModel) -> int:
    """Frames of silence between two chunks."""
    return round(_GAP_SECONDS * model.config.mel.frame_rate)


def _join(model: SpeechModel, parts: list[Spoken]) -> Spoken:
    """One utterance from chunks, with a short silence between them."""
    num_frames = gap(model)
    waves, frames = [parts[0].wave], [parts[0].frames_FM]
    for part in parts[1:]:
        waves += [part.wave.new_zeros(num_frames * model.config.mel.hop_length), part.wave]
        frames += [part.frames_FM.new_full((num_frames, part.frames_FM.shape[1]), SILENCE), part.frames_FM]
    return Spoken(torch.cat(waves), torch.cat(frames), torch.cat([part.codes_TK for part in parts]))
