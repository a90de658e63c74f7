"""The Talker's figures, by the protocol of docs/evaluation.md: is it understood, is it the speaker, how fast is it.

Generated speech is graded by recognizers, always beside the recordings of the same sentences. All of it is predicted
from the text; the voice comes from another recording of the same speaker.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from omni.audio import log_mel, standard_level
from omni.config import DataConfig
from omni.data.manifest import RULES
from omni.data.speech import read_speech_manifest
from omni.data.voices import Voices
from omni.evaluate.audio_enc import hear, hear_recordings
from omni.evaluate.speech_errors import mel_cepstral_distortion, slips
from omni.generate_speech import Mind, Spoken, embed_speakers, speak
from omni.metrics import Figure, character_error_rate, located, ratio, word_error_rate
from omni.models.audio_encoder import AudioEncoder
from omni.models.speech import SpeechModel
from omni.sampling import GREEDY, Sampling
from omni.speech_text import spoken_words
from omni.streaming import stream_speech

_NUM_SHUFFLED = 40  # sentences that are spoken once more with their words in another order
_LENGTHS = (("short", 1, 5), ("medium", 6, 15), ("long", 16, 10**6))  # words


@dataclass(frozen=True)
class SpeechSets:
    """What the Talker is asked to say.

    Attributes:
        heard: sentences of seen voices, all of whose words were heard in training.
        words: sentences with words never heard in training.
        voices: sentences of voices never heard in training.
        shuffled: sentences whose words stand in any order: the speech must follow the text. None: some of the first
            set are shuffled, of which there are no recordings then.
        limit: sentences of each; None: all.
        rules: the limits of their data.
    """

    heard: str | Path
    words: str | Path | None = None
    voices: str | Path | None = None
    shuffled: str | Path | None = None
    limit: int | None = None
    rules: DataConfig = RULES


@dataclass(frozen=True)
class Graders:
    """Who listens: the recognizer of stage B, and a judge that neither it nor the Talker shares anything with."""

    encoder: AudioEncoder
    judge: AudioEncoder | None = None


class _Part:
    """One test set, spoken and heard."""

    def __init__(
        self, model: SpeechModel, graders: Graders, mind: Mind | None, path: str | Path, sets: SpeechSets
    ) -> None:
        self.model, self.graders = model, graders
        rows = read_speech_manifest(path, sets.rules)[: sets.limit]
        self.voices = Voices(rows, model.config.mel, sets.rules)
        self.texts = [self.voices.text(index) for index in range(len(self.voices))]
        self.where = [self.voices.where(index) for index in range(len(self.voices))]
        self.spoken = speak_again(model, self.voices, mind)
        self.heard = self.hear(graders.encoder)
        self.heard_recordings = hear_recordings(graders.encoder, self.voices)

    def hear(self, encoder: AudioEncoder) -> list[str]:
        """What is understood of the generated speech."""
        return hear(encoder, [item.wave for item in self.spoken], self.model.config.mel.sample_rate)

    def error_rates(self, suffix: str) -> dict[str, Figure]:
        """Character error rates of the speech and of the recordings, by everyone who listens."""
        found = {}
        for name, encoder in (("", self.graders.encoder), ("_judge", self.graders.judge)):
            if encoder is not None:
                heard = self.hear(encoder) if name else self.heard
                found[f"cer{suffix}{name}"] = character_error_rate(self.texts, heard)
                known = hear_recordings(encoder, self.voices) if name else self.heard_recordings
                found[f"cer_recordings{suffix}{name}"] = character_error_rate(self.texts, known)
        return self.located(found)

    def located(self, figures: dict[str, Figure]) -> dict[str, Figure]:
        """Figures over the first sentences, or all, with their places."""
        return {name: located(figure, self.where[: len(figure.cases)]) for name, figure in figures.items()}

    def nearer(self) -> Figure | None:
        """How often speech is nearer to another recording of its speaker than to one of a random other speaker.

        By the speaker encoder that conditions nothing; None where there is one speaker only.
        """
        voices, rng = self.voices, np.random.default_rng(0)
        if len(voices.names) < 2:
            return None
        made = _embed_waves(self.model, self.spoken)
        known = embed_speakers(self.model, voices.recordings.all_frames(), grade=True)
        said = []
        for index, speaker in enumerate(voices.speakers):
            other = rng.choice(voices.of(str(rng.choice([name for name in voices.names if name != speaker]))))
            own = voices.partner(voices.partner(index, None), None)  # not the one that conditioned, if there are three
            said.append({"own": float(made[index] @ known[own]), "other": float(made[index] @ known[int(other)])})
        return located(ratio([float(item["own"] > item["other"]) for item in said], said=said), self.where)


def talker_figures(
    model: SpeechModel, graders: Graders, sets: SpeechSets, mind: Mind | None = None
) -> dict[str, Figure]:
    """Intelligibility, slips, likeness to the speaker, sound, length and speed of the Talker's speech.

    Args:
        model: a trained ``talker.pt``.
        graders: the recognizers that grade.
        sets: what is spoken.
        mind: Thinker and tokenizer, when the Talker shall get states.
    """
    part = _Part(model, graders, mind, sets.heard, sets)
    figures = part.error_rates("") | part.located({"wer": word_error_rate(part.texts, part.heard)}) | _by_length(part)
    others = [("_unseen_words", sets.words), ("_unseen_voices", sets.voices), ("_shuffled", sets.shuffled)]
    others_spoken = {name: _Part(model, graders, mind, path, sets) for name, path in others if path is not None}
    for name, other in others_spoken.items():
        figures |= other.error_rates(name)
    recorded = {f"{name}_recordings": figure for name, figure in slips(part.texts, part.heard_recordings).items()}
    own = slips(part.texts, part.heard) | recorded
    if sets.shuffled is None:
        own["cer_shuffled"] = _shuffled(part, mind)
    own["speaker_similarity"] = speaker_similarity(model, part.voices, part.spoken)
    for name, other in {"": part, **others_spoken}.items():
        nearer = other.nearer() if name in ("", "_unseen_voices") else None
        figures |= {f"speaker_nearer{name}": nearer} if nearer else {}
    said = [
        {"frames": len(item.frames_FM), "recorded": len(part.voices.frames(index))}
        for index, item in enumerate(part.spoken)
    ]
    outlying = [float(not 0.5 <= item["frames"] / item["recorded"] <= 2) for item in said]
    own["length_outliers"] = ratio(outlying, said=said)
    own["mcd"] = ratio(
        [
            mel_cepstral_distortion(item.frames_FM.cpu(), part.voices.frames(index), model.config.mel)
            for index, item in enumerate(part.spoken)
        ]
    )
    own |= speed_figures(model, part.texts[:10], embed_speakers(model, [part.voices.frames(0)]), mind)
    return figures | part.located(own)


def _by_length(part: _Part) -> dict[str, Figure]:
    """Character error rate of short, medium and long sentences."""
    found = {}
    for name, least, most in _LENGTHS:
        picked = [i for i, text in enumerate(part.texts) if least <= len(spoken_words(text)) <= most]
        if picked:
            figure = character_error_rate([part.texts[i] for i in picked], [part.heard[i] for i in picked])
            found[f"cer_{name}"] = located(figure, [part.where[index] for index in picked])
    return found


def _shuffled(part: _Part, mind: Mind | None) -> Figure:
    """Character error rate of the first sentences with their words in any order."""
    rng = np.random.default_rng(0)
    texts = []
    for text in part.texts[:_NUM_SHUFFLED]:
        words = [word.letters for word in spoken_words(text)]
        texts.append(" ".join(words[index] for index in rng.permutation(len(words))))
    speaker_NE = embed_speakers(part.model, references(part.voices, len(texts)))
    waves = [item.wave for item in speak(part.model, texts, speaker_NE, mind)]
    return character_error_rate(texts, hear(part.graders.encoder, waves, part.model.config.mel.sample_rate))


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
    """Cosine between generated speech (its waveform) and its reference, by the encoder that conditions nothing."""
    known = embed_speakers(model, references(voices), grade=True)
    return ratio(F.cosine_similarity(_embed_waves(model, spoken), known).tolist())


def _embed_waves(model: SpeechModel, spoken: Sequence[Spoken]) -> torch.Tensor:
    front = log_mel(model.config.mel)
    return embed_speakers(model, [front(standard_level(item.wave.cpu())) for item in spoken], grade=True)


def speed_figures(
    model: SpeechModel, texts: Sequence[str], speaker_1E: torch.Tensor, mind: Mind | None = None
) -> dict[str, Figure]:
    """Sentence by sentence, streamed: computing time over sound; milliseconds from the text to the first sound."""
    seconds, sound, first = [], [], []
    for number, text in enumerate([texts[0], *texts]):
        began, heard, samples = time.perf_counter(), 0.0, 0
        for piece in stream_speech(model, [text], speaker_1E[0], mind):
            heard = heard or time.perf_counter() - began
            samples += len(piece)
        if number:  # the first call is slower than all others
            seconds.append(time.perf_counter() - began)
            first.append(1000 * heard)
            sound.append(samples / model.config.mel.sample_rate)
    return {"rtf": ratio(seconds, sound), "first_audio_ms": ratio(first)}
