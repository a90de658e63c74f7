"""The codec's figures: what survives it and the vocoder, how its codes are used, how many bits they carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from omni.alignment import encode_recordings
from omni.audio import log_mel, standard_level
from omni.config import DataConfig
from omni.data.manifest import RULES
from omni.data.speech import read_speech_manifest
from omni.data.voices import Voices
from omni.evaluate.audio_enc import hear, hear_recordings
from omni.metrics import Figure, ListFigure, character_error_rate, located, ratio, with_cases
from omni.models.audio_encoder import AudioEncoder
from omni.models.quantizer import code_usage
from omni.models.speech import SpeechModel


@dataclass
class Resynthesis:
    """Recordings through the codec: decoded frames [F, M] of each, and their codes.

    Attributes:
        frames: decoded from all codebooks.
        mel_l1: error of each recording [K], decoded from the first codebook alone, from the first two, and so on.
        codes: codes [T, K] of each recording.
    """

    frames: list[torch.Tensor]
    mel_l1: list[list[float]]
    codes: list[torch.Tensor]


@torch.no_grad()
def resynthesize(model: SpeechModel, voices: Voices) -> Resynthesis:
    """Encode and decode every recording."""
    codes = encode_recordings(model, voices)
    frames, errors = [], []
    for index, codes_TK in enumerate(codes):
        true, found = voices.frames(index), []
        for count in range(1, codes_TK.shape[1] + 1):
            decoded = model.codec.decode(codes_TK[None, :, :count].to(model.device))[0, : len(true)].cpu()
            found.append(float((decoded - true).abs().mean()))
        frames.append(decoded)
        errors.append(found)
    return Resynthesis(frames, errors, codes)


def codec_figures(
    model: SpeechModel,
    encoder: AudioEncoder,
    manifest: str | Path,
    limit: int | None = None,
    rules: DataConfig = RULES,
) -> dict[str, Figure | ListFigure]:
    """Reconstruction, use of the codebooks, and how well resynthesized recordings are understood.

    ``cer_vocoder`` is what the vocoder alone costs (from the recordings' own frames), ``mel_l1_vocoder`` how far the
    frames of its sound are from those; ``cer_resynthesis`` is what codec and vocoder cost together, beside
    ``cer_recordings``.
    """
    voices = Voices(read_speech_manifest(manifest, rules)[:limit], model.config.mel, rules)
    texts = [voices.text(index) for index in range(len(voices))]
    made = resynthesize(model, voices)
    size, rate = model.config.codec.quantizer.codebook_size, model.config.mel.sample_rate
    coded = [_wave(model, frames) for frames in made.frames]
    vocoded = [_wave(model, voices.frames(index)) for index in range(len(voices))]
    figures: dict[str, Figure | ListFigure] = {
        "mel_l1": ratio([errors[-1] for errors in made.mel_l1]),
        "mel_l1_by_codebooks": _means(made.mel_l1),
        **_use_of_codes(model, made.codes, size),
        "mel_l1_vocoder": ratio([_distance(model, voices.frames(index), wave) for index, wave in enumerate(vocoded)]),
        "cer_resynthesis": character_error_rate(texts, hear(encoder, coded, rate)),
        "cer_vocoder": character_error_rate(texts, hear(encoder, vocoded, rate)),
        "cer_recordings": character_error_rate(texts, hear_recordings(encoder, voices)),
    }
    where = [voices.where(index) for index in range(len(voices))]
    return {name: located(figure, where) for name, figure in figures.items()}


def _use_of_codes(model: SpeechModel, codes: Sequence[torch.Tensor], size: int) -> dict[str, Figure | ListFigure]:
    """How many codes are used, in effect too, and the bits that they could carry and do; from all frames at once."""
    codes_NK = torch.cat(list(codes))
    usage, perplexity = _resampled_usage(codes_NK, size)
    carried = sum(math.log2(value) for value in perplexity.value) * model.code_rate
    said = [{"codes": item.tolist(), "codebook_size": size, "frames_per_second": model.code_rate} for item in codes]
    figures: dict[str, Figure | ListFigure] = {
        "usage": usage,
        "perplexity": perplexity,
        "bits_per_second": _exact(model.bits_per_second, len(codes_NK)),
        "bits_per_second_carried": _exact(carried, len(codes_NK)),
    }
    return {name: with_cases(figure, said) for name, figure in figures.items()}


def _exact(value: float, n: int) -> Figure:
    """A value that is computed from the configuration or from all codes at once."""
    return Figure(value, n, value, value)


def _means(rows: Sequence[Sequence[float]]) -> ListFigure:
    found = [ratio(column) for column in zip(*rows, strict=True)]
    figure = ListFigure([f.value for f in found], len(rows), [f.low for f in found], [f.high for f in found])
    return with_cases(figure, [{"values": list(row)} for row in rows])


def _resampled_usage(codes_NK: torch.Tensor, size: int, draws: int = 50) -> tuple[ListFigure, ListFigure]:
    """Usage and perplexity with intervals over resampled frames."""
    value = code_usage(codes_NK, size)
    rng = np.random.default_rng(0)
    picks = [torch.from_numpy(rng.integers(0, len(codes_NK), len(codes_NK))) for _ in range(draws)]
    drawn = np.array([code_usage(codes_NK[pick], size) for pick in picks])  # [draws, 2, K]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    n = len(codes_NK)
    return (
        ListFigure(value[0], n, low[0].tolist(), high[0].tolist()),
        ListFigure(value[1], n, low[1].tolist(), high[1].tolist()),
    )


def _distance(model: SpeechModel, frames_FM: torch.Tensor, wave_S: torch.Tensor) -> float:
    """Mean difference between log-mel frames and those of the sound that the vocoder made of them."""
    found_FM = log_mel(model.config.mel)(standard_level(wave_S.cpu()))
    return float((found_FM[: len(frames_FM)] - frames_FM[: len(found_FM)]).abs().mean())


def _wave(model: SpeechModel, frames_FM: torch.Tensor) -> torch.Tensor:
    return model.waveforms(frames_FM[None].to(model.device))[0]
