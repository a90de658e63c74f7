"""Recordings as the Talker learns them: when each word is spoken (stage B's alignment), codes, states, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from omni.cache import cache_key, through_cache
from omni.data.speech import pad_frames
from omni.data.voices import Aligned, Voices
from omni.generate_speech import embed_speakers
from omni.models.audio_encoder import AudioEncoder
from omni.models.speech import SpeechModel
from omni.models.thinker import Thinker
from omni.runtime import log
from omni.speech_text import spoken_words, units
from omni.thinker_states import word_states
from omni.timing import unit_durations, word_spans
from omni.tokenizer import Characters, Tokenizer, needed_steps

Spans = list[tuple[float, float]]  # first and one-past-last mel frame of each word
_LONGEST_EDGE_SECONDS = 0.2  # of silence kept before the first and after the last word


def align(encoder: AudioEncoder, voices: Voices, caches: Sequence[Path]) -> list[Spans | None]:
    """The words of every recording in time, None where they do not fit; from the caches if they are there."""
    texts = [voices.text(index) for index in range(len(voices))]
    key = cache_key([encoder], voices.paths, texts)

    def compute() -> list[torch.Tensor]:
        return [torch.tensor(spans or [], dtype=torch.float64) for spans in _align(encoder, voices)]

    kept = through_cache(caches, "alignment", key, compute)
    return [[(first, end) for first, end in spans_W2.tolist()] or None for spans_W2 in kept]


@torch.no_grad()
def _align(encoder: AudioEncoder, voices: Voices, batch_size: int = 32) -> list[Spans | None]:
    order = sorted(range(len(voices)), key=lambda index: voices.recordings.num_frames[index])
    found: list[Spans | None] = [None] * len(voices)
    characters, device = Characters(), encoder.head.weight.device
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        frames_BFM, sizes_B = pad_frames([voices.frames_as(encoder.config.mel, index) for index in picked])
        output = encoder(frames_BFM.to(device), sizes_B.to(device))
        log_probs_BSV = output.log_probs_BSV.cpu()
        for row, (index, steps) in enumerate(zip(picked, output.num_steps_B.tolist(), strict=True)):
            words = [word.letters for word in spoken_words(voices.text(index))]
            if words and needed_steps(characters.encode(" ".join(words))) <= steps:
                found[index] = word_spans(voices.frames(index), log_probs_BSV[row, :steps], words)
    return found


def sentences(
    model: SpeechModel,
    voices: Voices,
    spans: Sequence[Spans | None],
    codes: Sequence[torch.Tensor],
    mind: tuple[Thinker, Tokenizer] | None,
    name: str,
) -> list[Aligned]:
    """Codes, durations and the Thinker's states of every recording whose words fit into it; the others are counted."""
    reduction = model.config.codec.reduction
    edge = round(_LONGEST_EDGE_SECONDS * model.code_rate)
    result = []
    words = [spoken_words(voices.text(index)) for index in range(len(voices))]
    states: list[torch.Tensor] = []
    if mind is not None:
        texts = [(voices.text(index), words[index]) for index in range(len(voices))]
        states = [found.float().cpu() for found in word_states(*mind, texts, model.config.thinker_layer)]
    for index, words_spans in enumerate(spans):
        if words_spans is None:
            continue
        timing = unit_durations(words_spans, len(codes[index]), reduction, edge)
        if timing is None:
            continue
        first, durations = timing
        states_UD = states[index] if states else None
        codes_TK = codes[index][first : first + sum(durations), : model.talker.num_codebooks]
        result.append(Aligned(index, units(words[index]), durations, codes_TK, states_UD))
    if len(result) < len(voices):
        log.warning(
            "%s: the words of %d of %d recordings do not fit into them and are left out",
            name, len(voices) - len(result), len(voices),
        )  # fmt: skip
    return result


@torch.no_grad()
def encode_recordings(model: SpeechModel, voices: Voices, batch_size: int = 32) -> list[torch.Tensor]:
    """Codes [T, K] of every recording."""
    order = sorted(range(len(voices)), key=lambda index: voices.recordings.num_frames[index])
    codes = [torch.empty(0)] * len(voices)
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        frames_BFM, sizes_B = pad_frames([voices.frames(index) for index in picked], multiple=16)
        found_BTK = model.codec.encode(frames_BFM.to(model.device), sizes_B.to(model.device)).cpu()
        for row, index in enumerate(picked):
            codes[index] = found_BTK[row, : int(model.codec.num_codes(sizes_B[row]))]
    return codes


def codes_and_embeddings(
    model: SpeechModel, voices: Voices, caches: Sequence[Path]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Codes [T, K] of every recording and speaker embeddings [N, E] of all; from the caches if they are there."""

    def compute() -> list[torch.Tensor]:
        embeddings_NE = embed_speakers(model, voices.recordings.all_frames()).cpu()
        return [embeddings_NE, *encode_recordings(model, voices)]

    key = cache_key([model.codec, model.speaker], voices.paths)
    embeddings_NE, *codes = through_cache(caches, "codes", key, compute)
    return codes, embeddings_NE


def mean_embeddings(voices: Voices, embeddings_NE: torch.Tensor) -> torch.Tensor:
    """The mean unit embedding of each speaker, in the order of ``voices.names``."""
    means = torch.stack([embeddings_NE[voices.of(name)].mean(0) for name in voices.names])
    return torch.nn.functional.normalize(means, dim=-1)
