"""Stage D's figures: how much of speech survives the codec, and how well the Talker is understood.

Generated speech is graded by stage B's recognizer, always beside the recordings of the same sentences. All of it is
predicted from the text; the voice comes from another recording of the same speaker.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from omni.alignment import encode_recordings
from omni.audio import log_mel, standard_level
from omni.config import DataConfig
from omni.data.manifest import RULES
from omni.data.speech import read_speech_manifest
from omni.data.voices import CropBatch, SentenceBatch, VoiceBatch, Voices
from omni.evaluate.audio_enc import transcribe
from omni.generate_speech import Mind, Spoken, embed_speakers, speak
from omni.metrics import Figure, character_error_rate, ratio, word_error_rate
from omni.models.audio_encoder import AudioEncoder
from omni.models.quantizer import code_usage
from omni.models.speech import SpeechModel
from omni.models.talker import talker_losses
from omni.models.vocoder import spectral_loss_sum
from omni.sampling import GREEDY, Sampling

_FIRST_AUDIO_SECONDS = 0.5  # of speech that the first piece of sound holds


@dataclass(frozen=True)
class ListFigure:
    """A figure with one value a codebook; see :class:`omni.metrics.Figure`."""

    value: list[float]
    n: int
    low: list[float]
    high: list[float]

    def to_dict(self) -> dict[str, Any]:
        """The figure as ``omni eval --json`` writes it."""
        rounded = {key: [round(x, 6) for x in getattr(self, key)] for key in ("value", "low", "high")}
        return {"value": rounded["value"], "n": self.n, "low": rounded["low"], "high": rounded["high"]}


@dataclass
class Resynthesis:
    """Recordings through the codec: decoded frames [F, M] of each, its L1 error, all codes [N, K]."""

    frames: list[torch.Tensor]
    mel_l1: list[float]
    codes_NK: torch.Tensor


@torch.no_grad()
def resynthesize(model: SpeechModel, voices: Voices) -> Resynthesis:
    """Encode and decode every recording."""
    codes = encode_recordings(model, voices)
    frames, errors = [], []
    for index, codes_TK in enumerate(codes):
        true = voices.frames(index)
        frames.append(model.codec.decode(codes_TK[None].to(model.device))[0, : len(true)].cpu())
        errors.append(float((frames[-1] - true).abs().mean()))
    return Resynthesis(frames, errors, torch.cat(codes))


def hear(encoder: AudioEncoder, waves: Sequence[torch.Tensor]) -> list[str]:
    """What stage B understands of waveforms."""
    front = log_mel(encoder.config.mel)
    return transcribe(encoder, [front(standard_level(wave.cpu())) for wave in waves])


def codec_figures(
    model: SpeechModel,
    encoder: AudioEncoder,
    manifest: str | Path,
    limit: int | None = None,
    rules: DataConfig = RULES,
) -> dict[str, Figure | ListFigure]:
    """Reconstruction, use of the codebooks, and how well resynthesized recordings are understood."""
    voices = Voices(read_speech_manifest(manifest, rules)[:limit], model.config.mel, rules)
    texts = [voices.text(index) for index in range(len(voices))]
    made = resynthesize(model, voices)
    waves = [_wave(model, frames) for frames in made.frames]
    size = model.config.codec.quantizer.codebook_size
    usage, perplexity = _resampled_usage(made.codes_NK, size)
    return {
        "mel_l1": ratio(made.mel_l1),
        "usage": usage,
        "perplexity": perplexity,
        "cer_resynthesis": character_error_rate(texts, hear(encoder, waves)),
        "cer_recordings": character_error_rate(texts, _hear_recordings(encoder, voices)),
    }


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


def _wave(model: SpeechModel, frames_FM: torch.Tensor) -> torch.Tensor:
    return model.waveforms(frames_FM[None].to(model.device))[0]


def _hear_recordings(encoder: AudioEncoder, voices: Voices) -> list[str]:
    return transcribe(encoder, voices.recordings.all_frames())


def talker_figures(
    model: SpeechModel,
    encoder: AudioEncoder,
    test: str | Path,
    test_words: str | Path | None = None,
    test_voices: str | Path | None = None,
    mind: Mind | None = None,
    limit: int | None = None,
    rules: DataConfig = RULES,
) -> dict[str, Figure | ListFigure]:
    """Intelligibility, likeness to the speaker, length and speed of the Talker's speech.

    Args:
        model: a trained ``talker.pt``.
        encoder: the recognizer that grades.
        test: sentences of seen voices.
        test_words: sentences with words never heard in training.
        test_voices: sentences of voices never heard in training.
        mind: Thinker and tokenizer, when the Talker shall get states.
        limit: sentences of each manifest.
        rules: the limits of their data.
    """
    voices = Voices(read_speech_manifest(test, rules)[:limit], model.config.mel, rules)
    texts = [voices.text(index) for index in range(len(voices))]
    spoken = speak_again(model, voices, mind)
    heard = hear(encoder, [item.wave for item in spoken])
    figures: dict[str, Figure | ListFigure] = {
        "cer": character_error_rate(texts, heard),
        "wer": word_error_rate(texts, heard),
        "cer_recordings": character_error_rate(texts, _hear_recordings(encoder, voices)),
    }
    for name, manifest in (("cer_unseen_words", test_words), ("cer_unseen_voices", test_voices)):
        if manifest is not None:
            others = Voices(read_speech_manifest(manifest, rules)[:limit], model.config.mel, rules)
            waves = [item.wave for item in speak_again(model, others, mind)]
            figures[name] = character_error_rate(
                [others.text(index) for index in range(len(others))], hear(encoder, waves)
            )
    figures["speaker_similarity"] = speaker_similarity(model, voices, spoken)
    lengths = [len(item.frames_FM) / len(voices.frames(index)) for index, item in enumerate(spoken)]
    figures["length_outliers"] = ratio([float(not 0.5 <= length <= 2) for length in lengths])
    return figures | speed_figures(model, texts[:10], embed_speakers(model, [voices.frames(0)]))


# ---- validation during training ----


def validate_codec(model: SpeechModel, batches: Iterable[CropBatch]) -> dict[str, float]:
    """L1 of log-mel frames; usage and perplexity of the worst codebook."""
    error, frames, codes = 0.0, 0, []
    for batch in batches:
        output = model.codec(batch.frames_BFM)
        error += float((output.frames_BFM.float() - batch.frames_BFM).abs().mean(-1).sum())
        frames += batch.counts["frames"]
        codes.append(output.codes_BTK.flatten(0, 1))
    usage, perplexity = code_usage(torch.cat(codes), model.config.codec.quantizer.codebook_size)
    return {"loss": error / frames, "mel_l1": error / frames, "usage": min(usage), "perplexity": min(perplexity)}


def validate_vocoder(model: SpeechModel, batches: Iterable[VoiceBatch]) -> dict[str, float]:
    """Spectral loss from true frames and from decoded ones; how often the nearest crop is of the same speaker."""
    true = decoded = right = 0.0
    crops = 0
    for batch in batches:
        true += float(spectral_loss_sum(model.vocoder(batch.frames_BFM), batch.wave_BS))
        coded_BFM = model.codec(batch.frames_BFM).frames_BFM.float()
        decoded += float(spectral_loss_sum(model.vocoder(coded_BFM), batch.wave_BS))
        likeness_BB = model.speaker(batch.first_BFM) @ model.speaker(batch.second_BFM).T
        right += float((batch.speaker_B[likeness_BB.argmax(1)] == batch.speaker_B).sum())
        crops += len(batch.frames_BFM)
    return {
        "loss": decoded / crops, "spectral_loss": true / crops, "spectral_loss_coded": decoded / crops,
        "speaker_accuracy": right / crops,
    }  # fmt: skip


def validate_talker(model: SpeechModel, batches: Iterable[SentenceBatch]) -> dict[str, float]:
    """Loss and accuracy of the codes given the true ones before, and error of word durations in proportion."""
    codes = stop = durations = wrong = 0.0
    right_K: torch.Tensor | int = 0
    frames = num_units = words = 0
    for batch in batches:
        losses = talker_losses(model.talker, batch.text(), batch.plan(), batch.codes_BTK, batch.durations_BU)
        codes, stop, durations = (
            codes + float(losses.codes),
            stop + float(losses.stop),
            durations + float(losses.durations),
        )
        right_K = right_K + losses.right_K
        frames, num_units = frames + batch.counts["frames"], num_units + batch.counts["durations"]
        predicted_BU = model.talker.durations(
            model.talker.encode_text(batch.text()), batch.text(), batch.durations_BU.shape[1]
        )
        true_BW = batch.durations_BU[:, 1::2]
        spoken = true_BW > 0
        wrong += float(((predicted_BU[:, 1::2] - true_BW).abs() / true_BW.clamp(min=1))[spoken].sum())
        words += int(spoken.sum())
    accuracy = [float(right) / frames for right in torch.as_tensor(right_K)]
    return {
        "loss": codes / frames, "stop_loss": stop / frames, "duration_loss": durations / num_units,
        "base_accuracy": accuracy[0], "residual_accuracy": sum(accuracy[1:]) / max(1, len(accuracy) - 1),
        "duration_error": wrong / words,
    }  # fmt: skip


def grade_samples(
    model: SpeechModel, encoder: AudioEncoder, voices: Voices, mind: Mind | None, limit: int
) -> dict[str, float]:
    """Character error rate of the first sentences, generated with everything predicted."""
    spoken = speak_again(model, voices, mind, limit=limit)
    texts = [voices.text(index) for index in range(len(spoken))]
    return {"cer": character_error_rate(texts, hear(encoder, [item.wave for item in spoken])).value}


# ---- speech for evaluation ----


def references(voices: Voices, limit: int | None = None) -> list[torch.Tensor]:
    """For every recording (or the first ``limit``) the frames of another one of the same speaker."""
    return [voices.frames(voices.partner(index, None)) for index in range(len(voices))[:limit]]


def speak_again(
    model: SpeechModel, voices: Voices, mind: Mind | None = None, sampling: Sampling = GREEDY, limit: int | None = None
) -> list[Spoken]:
    """Speak the text of every recording (or the first ``limit``) in the voice of another one of the same speaker."""
    speaker_NE = embed_speakers(model, references(voices, limit))
    texts = [voices.text(index) for index in range(len(speaker_NE))]
    spoken = []
    for first in range(0, len(texts), 100):
        spoken += speak(model, texts[first : first + 100], speaker_NE[first : first + 100], mind, sampling)
    return spoken


def speaker_similarity(model: SpeechModel, voices: Voices, spoken: Sequence[Spoken]) -> Figure:
    """Cosine between the embeddings of generated speech (of its waveform) and of its reference."""
    front = log_mel(model.config.mel)
    made = embed_speakers(model, [front(standard_level(item.wave.cpu())) for item in spoken])
    return ratio(F.cosine_similarity(made, embed_speakers(model, references(voices))).tolist())


def speed_figures(model: SpeechModel, texts: Sequence[str], speaker_1E: torch.Tensor) -> dict[str, Figure]:
    """Sentence by sentence: computing time over sound, and milliseconds to the first half second of sound."""
    first_frames = round(_FIRST_AUDIO_SECONDS * model.code_rate)
    seconds, sound, first = [], [], []
    speak(model, texts[:1], speaker_1E)  # the first call is slower than all others
    for text in texts:
        began = time.perf_counter()
        codes = generate_codes(model.talker, [units(chunks(text)[0])], speaker_1E, max_frames=first_frames)
        render(model, codes)
        first.append(1000 * (time.perf_counter() - began))
        began = time.perf_counter()
        wave = speak(model, [text], speaker_1E)[0].wave
        seconds.append(time.perf_counter() - began)
        sound.append(len(wave) / model.config.mel.sample_rate)
    return {"rtf": ratio(seconds, sound), "first_audio_ms": ratio(first)}
