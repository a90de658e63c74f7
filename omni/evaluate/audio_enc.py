"""Stage B's figures: word and character error rates of recordings, and what the recognizer wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from omni.audio import log_mel, resample, standard_level
from omni.data.speech import Recordings, pad_frames
from omni.data.voices import Voices
from omni.metrics import Figure, character_error_rate, located, ratio, word_error_rate
from omni.models.audio_encoder import AudioEncoder, transcripts
from omni.tokenizer import Characters, needed_steps, spoken_text


@dataclass
class Recognition:
    """Raw results: what was said and what was recognized, utterance by utterance, and where these stand."""

    references: list[str]
    hypotheses: list[str]
    where: list[str] = field(default_factory=list)

    def wer(self) -> Figure:
        """Word error rate."""
        return self._located(word_error_rate(self.references, self.hypotheses))

    def cer(self) -> Figure:
        """Character error rate."""
        return self._located(character_error_rate(self.references, self.hypotheses))

    def _located(self, figure: Figure) -> Figure:
        return located(figure, self.where) if self.where else figure


@torch.no_grad()
def transcribe(encoder: AudioEncoder, frames: Sequence[torch.Tensor], batch_size: int = 32) -> list[str]:
    """Transcripts of log-mel frames [F, M], batched by length, returned in the given order."""
    device = encoder.head.weight.device
    order = sorted(range(len(frames)), key=lambda index: len(frames[index]))
    texts = [""] * len(frames)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        frames_BFM, num_frames_B = pad_frames([frames[index] for index in indices])
        output = encoder(frames_BFM.to(device), num_frames_B.to(device))
        for index, text in zip(indices, transcripts(output), strict=True):
            texts[index] = text
    return texts


def hear(encoder: AudioEncoder, waves: Sequence[torch.Tensor], sample_rate: int) -> list[str]:
    """What an encoder understands of waveforms [S] of any rate and level."""
    mel = encoder.config.mel
    levelled = (standard_level(resample(wave.cpu(), sample_rate, mel.sample_rate)) for wave in waves)
    return transcribe(encoder, [log_mel(mel)(wave) for wave in levelled])


def hear_recordings(encoder: AudioEncoder, voices: Voices, limit: int | None = None) -> list[str]:
    """What an encoder understands of recordings, whatever front end they were read with."""
    count = len(voices) if limit is None else min(limit, len(voices))
    return transcribe(encoder, [voices.frames_as(encoder.config.mel, index) for index in range(count)])


def recognize(encoder: AudioEncoder, recordings: Recordings) -> Recognition:
    """Recognize every recording of a manifest."""
    references = [str(row.values["text"]) for row in recordings.rows]
    where = [row.where for row in recordings.rows]
    return Recognition(references, transcribe(encoder, recordings.all_frames()), where)


def infeasible(encoder: AudioEncoder, recordings: Recordings) -> Figure:
    """Share of utterances with more characters than CTC steps can hold."""
    symbols = [Characters().encode(spoken_text(str(row.values["text"]))) for row in recordings.rows]
    steps = [encoder.num_steps(frames) for frames in recordings.num_frames]
    said = [{"symbols": item, "steps": most} for item, most in zip(symbols, steps, strict=True)]
    lacking = [float(needed_steps(item) > most) for item, most in zip(symbols, steps, strict=True)]
    return located(ratio(lacking, said=said), [row.where for row in recordings.rows])
