"""One trained omni model to talk to: what the terminal chat and the server share.

Pictures and recordings of a conversation are decoded when they arrive, so that a bad file is known at once, and
encoded when an answer first needs them. Nothing of a conversation is kept here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch

from omni.audio import load_audio, log_mel, standard_level, trim_silence
from omni.config import DataConfig, RunConfig, UserError
from omni.data.dialogue import ChatEncoder, Encoded, Message, Part, TooLongError
from omni.data.images import load_image
from omni.decoding import Draft
from omni.features import encode_frames, encode_pixels
from omni.generate import AnswerSettings, Generation
from omni.generate_speech import Mind, embed_speakers
from omni.hearing import as_written, words_heard
from omni.load import load_draft, load_omni
from omni.models.omni import OmniModel
from omni.prompt_pieces import PromptPiece, prompt_pieces
from omni.runtime import setup_compute
from omni.sampling import GREEDY, Sampling
from omni.speech_text import spoken_words
from omni.streaming import stream_speech
from omni.summary import read_summary
from omni.tokenizer import Tokenizer

Result = TypeVar("Result")
# What people send is decoded while others wait: far less than a training set may hold
MEDIA_RULES = DataConfig(max_pixels=24_000_000, max_audio_seconds=30.0)
_ANSWER_ROOM = 64  # positions kept free for an answer, or a quarter of them where that is less
_LONGEST_PIECE = 16  # characters that a token may stand for: SentencePiece's default


@dataclass(frozen=True)
class Voice:
    """How an answer sounds.

    Attributes:
        name: a speaker of the training data; None: the first.
        reference_FM: log-mel frames of a recording whose voice is meant instead.
        speed: 2.0 halves every duration.
        sampling: how codes are drawn.
    """

    name: str | None = None
    reference_FM: torch.Tensor | None = None
    speed: float = 1.0
    sampling: Sampling = GREEDY


def longest_end(
    messages: Sequence[Message], fits: Callable[[Sequence[Message]], Result]
) -> tuple[Result, Sequence[Message]]:
    """Leave out the oldest turns of a chat, but for what the system says, until it fits.

    Args:
        messages: the whole chat.
        fits: raises TooLongError where a chat does not fit.

    Returns:
        What ``fits`` gave, and the chat that it gave it for.

    Raises:
        TooLongError: when not even the last question fits.
    """
    while True:
        try:
            return fits(messages), messages
        except TooLongError:
            starts = [index for index, message in enumerate(messages) if message.role == "user"]
            if len(starts) < 2:
                raise
            system = itertools.takewhile(lambda message: message.role == "system", messages)
            messages = [*system, *messages[starts[1] :]]


class Media:
    """The pictures and recordings of one conversation, by name. Features are those that training and evaluation see."""

    def __init__(self, model: OmniModel, tokenizer: Tokenizer, rules: DataConfig = MEDIA_RULES) -> None:
        self._model, self._tokenizer, self._rules = model, tokenizer, rules
        self._pixels: dict[str, torch.Tensor] = {}
        self._frames: dict[str, torch.Tensor] = {}
        self._features: dict[str, torch.Tensor] = {}
        self._words: dict[str, str] = {}
        self._written: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._pixels or name in self._frames

    def add_image(self, name: str, source: Path | BinaryIO) -> None:
        """Decode a picture. Raises UserError, which calls it ``name``, when it is none or too large."""
        size = self._model.config.vision_encoder.image_size
        self._pixels[name] = load_image(source, size, name, self._rules.max_pixels)

    def add_audio(self, name: str, source: Path | BinaryIO) -> float:
        """Decode a recording; returns its seconds. Raises UserError when it is none or too long."""
        mel = self._model.config.audio_encoder.mel
        limit = self._rules.max_audio_seconds
        return self.add_wave(name, load_audio(source, mel.sample_rate, False, max_seconds=limit, name=name))

    def add_wave(self, name: str, wave: torch.Tensor) -> float:
        """Take samples at the encoder's rate, of any level; returns their seconds."""
        mel = self._model.config.audio_encoder.mel
        if len(wave) < mel.n_fft:
            raise UserError(f"{name}: found {len(wave)} samples, expected a recording of at least {mel.n_fft}")
        # who holds a button to talk begins late and ends late; the recordings of training do not
        spoken = trim_silence(wave, mel.sample_rate)
        self._frames[name] = log_mel(mel)(standard_level(spoken if len(spoken) >= mel.n_fft else wave))
        return len(wave) / mel.sample_rate

    def frames(self, name: str) -> torch.Tensor:
        """Log-mel frames [F, M] of a recording."""
        return self._frames[name]

    def keep(self, names: Iterable[str]) -> None:
        """Forget all others."""
        wanted = set(names)
        for held in (self._pixels, self._frames, self._features, self._words):
            for name in held.keys() - wanted:
                del held[name]

    def audio_positions(self, name: str) -> int:
        """Positions that a recording takes in the Thinker's sequence."""
        num_states_1 = self._model.audio_encoder.num_states(torch.tensor([len(self._frames[name])]))
        return self._model.audio_positions(int(num_states_1))

    def words(self, name: str) -> str:
        """What is said in a recording (:mod:`omni.hearing`); nothing where the model does not take it."""
        if not self._model.config.with_words:
            return ""
        if name not in self._words:
            model = self._model
            self._words[name] = words_heard(model.audio_encoder, model.thinker, self._tokenizer, [self.audio(name)])[0]
        return self._words[name]

    def as_written(self, texts: Iterable[str]) -> dict[str, str]:
        """What was typed, and how it is read (:func:`omni.hearing.as_written`)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._written]
        self._written |= zip(new, as_written(self._model.thinker, self._tokenizer, new), strict=True)
        return self._written

    def image(self, name: str) -> torch.Tensor:
        """Patch tokens [P, D]."""
        if name not in self._features:
            self._features[name] = encode_pixels(self._model.vision_encoder, [self._pixels[name]])[0].half()
        return self._features[name].float()

    def audio(self, name: str) -> torch.Tensor:
        """Audio encoder states [T, D]."""
        if name not in self._features:
            self._features[name] = encode_frames(self._model.audio_encoder, [self._frames[name]])[0].half()
        return self._features[name].float()


class Assistant:
    """An omni model that answers conversations.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        name: what it is called.
        draft: guesses ahead for it, which makes answers come sooner or later, and changes none.
    """

    def __init__(self, model: OmniModel, tokenizer: Tokenizer, name: str, draft: Draft | None = None) -> None:
        self.model, self.tokenizer, self.name, self.draft = model, tokenizer, name, draft
        speech = model.speech.config
        self.voices, self.sample_rate = speech.voices, speech.mel.sample_rate
        self.ctx_len = model.thinker.config.ctx_len

    @classmethod
    def load(cls, checkpoint: Path, device: str = "auto", draft: Path | None = None) -> Assistant:
        """The assistant of an ``omni.pt``, named after its run; with the ``thinker.pt`` of a draft, it guesses ahead.

        Raises:
            UserError: when a file is missing, damaged or another stage's, the draft does not fit to the model, or there
                is no such device.
        """
        precision = setup_compute(RunConfig(device=device))
        model, tokenizer = load_omni(checkpoint)
        model = model.to(precision.device)
        smaller = Draft(load_draft(draft, model.thinker, tokenizer)) if draft is not None else None
        return cls(model, tokenizer, str(read_summary(checkpoint)["config"]["name"]), smaller)

    @property
    def seconds_heard(self) -> float:
        """How long a recording may be, and all of a conversation together, where words leave room for them."""
        encoder, mel = self.model.config.audio_encoder, self.model.config.audio_encoder.mel
        positions = self.ctx_len // 4
        seconds = positions * self.model.config.audio_projector.stack * encoder.reduction / mel.frame_rate
        return min(seconds, MEDIA_RULES.max_audio_seconds)

    def media(self) -> Media:
        """Room for a conversation's pictures and recordings."""
        return Media(self.model, self.tokenizer)

    @property
    def _room(self) -> int:
        """Positions kept free for an answer."""
        return min(_ANSWER_ROOM, self.ctx_len // 4)

    def check_size(self, messages: Sequence[Message]) -> None:
        """Raises TooLongError for what can never fit, before any of it is decoded or encoded."""
        left, parts = self.ctx_len - self._room, [part for message in messages for part in message.parts]
        num_characters = sum(len(part.value) for part in parts if part.kind == "text")
        if num_characters > left * _LONGEST_PIECE:
            raise TooLongError(f"the chat has {num_characters} characters, more than {left} positions can hold")
        for kind, name, most in (
            ("image", "pictures", left // self.model.image_positions),
            ("audio", "recordings", self.ctx_len // 4),
        ):
            found = sum(part.kind == kind for part in parts)
            if found > most:
                raise TooLongError(f"the chat has {found} {name}, expected at most {most}")

    def prompt(self, messages: Sequence[Message], media: Media) -> Encoded:
        """A conversation up to where the next answer begins; nothing is cut.

        What the user typed is written as the Thinker would expect it (:func:`omni.hearing.as_written`).

        Raises:
            TooLongError: when it leaves no room for an answer.
        """
        self.check_size(messages)
        recordings = [part.value for message in messages for part in message.parts if part.kind == "audio"]
        if sum(map(media.audio_positions, recordings)) > self.ctx_len // 4:
            longest = f"expected at most {self.seconds_heard:.1f} s of them together"
            raise TooLongError(f"the chat's recordings are too long, {longest}")
        encoder = ChatEncoder(
            self.tokenizer, self.model.image_positions, media.audio_positions, media.words, self.ctx_len
        )
        encoded = encoder.prompt(_as_written(messages, media), self._room)
        if encoder.audio_cuts:
            most = f"expected at most {self.ctx_len // 4} tokens of them together"
            raise TooLongError(f"the chat's recordings say too many words, {most}")
        return encoded

    def pieces(self, prompt: Encoded) -> list[PromptPiece]:
        """What a prompt is made of, in order."""
        return prompt_pieces(prompt, self.tokenizer, self.model.image_positions)

    def answer(self, prompt: Encoded, media: Media, settings: AnswerSettings) -> Generation:
        """The answer to a prompt, while it is written (:class:`omni.generate.Generation` of one row)."""
        return Generation(self.model, self.tokenizer, [prompt], media, settings, self.draft)

    def check_voice(self, name: str | None) -> None:
        """Raises UserError when there is no such voice, or none at all."""
        if not self.voices:
            raise UserError("this model was trained without named voices and cannot speak")
        if name is not None:
            self.model.speech.voice(name)

    def say(self, pieces: Iterable[str], voice: Voice) -> Iterator[torch.Tensor]:
        """Yield the samples [S] of a text, at ``sample_rate``, while it still arrives.

        Raises:
            UserError: when there is nothing to speak, or no such voice.
        """
        speech, speaker_E = self.model.speech, self._speaker(voice)
        mind: Mind | None = (self.model.thinker, self.tokenizer) if speech.config.talker.state_dim else None
        yield from stream_speech(speech, pieces, speaker_E, mind, voice.sampling, voice.speed)

    def say_answer(self, pieces: Iterable[str], voice: Voice) -> Iterator[torch.Tensor]:
        """The same for what the model says; an answer without words is a quarter of a second of silence."""
        said = list[str]()

        def spoken() -> Iterator[str]:
            for piece in pieces:
                said.append(piece)
                yield piece

        try:
            yield from self.say(spoken(), voice)
        except UserError:
            if spoken_words("".join(said)):
                raise
            yield torch.zeros(self.sample_rate // 4)

    def _speaker(self, voice: Voice) -> torch.Tensor:
        if voice.reference_FM is not None:
            return embed_speakers(self.model.speech, [voice.reference_FM])[0]
        return self.model.speech.voice(voice.name)

    def transcribe(self, frames_FM: torch.Tensor) -> str:
        """What is said in a recording, given as log-mel frames."""
        encoder = self.model.audio_encoder
        return words_heard(encoder, self.model.thinker, self.tokenizer, encode_frames(encoder, [frames_FM]))[0]


def _as_written(messages: Sequence[Message], media: Media) -> list[Message]:
    """The same messages; what the user typed at one go is read as the Thinker would expect it.

    Of a text in several parts none is a turn by itself: they stay.
    """

    def lines(message: Message) -> list[str]:
        texts = [part.value for part in message.parts if part.kind == "text"]
        return texts if message.role == "user" and len(texts) == 1 else []

    written = media.as_written(line for message in messages for line in lines(message))
    return [
        Message(message.role, tuple(_read(part, written) for part in message.parts)) if lines(message) else message
        for message in messages
    ]


def _read(part: Part, written: Mapping[str, str]) -> Part:
    return Part("text", written[part.value]) if part.kind == "text" else part
