"""Chats for stage E: messages with text, pictures and recordings, as tokens with placeholders and labels.

The template is the one stage A's text uses: ``<|user|> question<|end|><|assistant|> answer<|end|>``. A picture or a
recording stands in it as as many ``<|image|>`` or ``<|audio|>`` tokens as its projector makes positions; the model puts
the projected features there. Labels are the assistant's tokens, its end-of-turn token included, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from omni.audio import recording_seconds
from omni.config import DataConfig, UserError
from omni.data.entries import type_name
from omni.data.images import read_image_size
from omni.data.manifest import RULES, Manifest, Row, path_problem, scan_jsonl, too_long
from omni.tokenizer import ASSISTANT, AUDIO, END, IGNORE, IMAGE, SYSTEM, USER, Tokenizer, turn_text

_ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
_MEDIA = {"image": IMAGE, "audio": AUDIO}


@dataclass(frozen=True)
class Part:
    """A piece of a message: text, or the path of a picture or recording."""

    kind: str  # text, image or audio
    value: str


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    parts: tuple[Part, ...]


@dataclass
class Chat:
    """One line of ``sft.jsonl``."""

    where: str
    messages: list[Message]
    task: str = "chat"
    template: str | list[str] = ""
    held_out: str = ""
    speak: bool = False
    transcript: str = ""  # of the chat's only recording

    def paths(self, kind: str) -> list[str]:
        """The chat's pictures or recordings, in order."""
        return [part.value for message in self.messages for part in message.parts if part.kind == kind]

    @property
    def media(self) -> list[str]:
        """All of its pictures and recordings."""
        return [path for kind in _MEDIA for path in self.paths(kind)]

    @property
    def answer(self) -> str:
        """What the assistant says in the last turn."""
        return "".join(part.value for part in self.messages[-1].parts)


def scan_chats(path: str | Path, rules: DataConfig = RULES) -> Manifest[Chat]:
    """Chats and problems of a JSONL file, the headers of their pictures and recordings read."""
    return scan_jsonl(Path(path), lambda row: _chat(row, rules))


def read_chats(path: str | Path, rules: DataConfig = RULES) -> list[Chat]:
    """All chats of a JSONL file.

    Raises:
        UserError: listing every malformed message and every missing or too large picture or recording by its line,
            unless the rules leave such chats out.
    """
    return scan_chats(path, rules).usable(rules)


def _chat(row: Row, rules: DataConfig) -> Chat:
    """A row as a chat; a ValueError says what is wrong."""
    values = row.values
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: found {type_name(messages)}, expected a list of at least one message")
    parsed = parse_messages(messages)
    if parsed[-1].role != "assistant":
        raise ValueError(f"the last message: found the {parsed[-1].role}'s, expected the assistant's")
    for key in ("task", "held_out", "transcript"):
        if key in values and not isinstance(values[key], str):
            raise ValueError(f"{key}: found {type_name(values[key])}, expected a text")
    template = values.get("template", "")
    if not isinstance(template, str | list):
        raise ValueError(f"template: found {type_name(template)}, expected a text or a list of texts")
    return Chat(
        row.where,
        [Message(message.role, tuple(_located(row, part, rules) for part in message.parts)) for message in parsed],
        values.get("task", "chat"),
        template,
        values.get("held_out", ""),
        values.get("speak") is True,
        values.get("transcript", ""),
    )


def _located(row: Row, part: Part, rules: DataConfig) -> Part:
    """A part that the rules let pass; a picture or recording by its path from here."""
    if part.kind == "text":
        if len(part.value) > rules.max_text_chars:
            raise ValueError(f"text: {too_long(len(part.value), rules)}")
        return part
    # chats speak of pictures and recordings, whose folders may lie beside their own: ../images/1.png
    data_folder = row.folder.resolve().parent
    if problem := path_problem(part.value, row.folder, data_folder, rules):
        raise ValueError(f"{part.kind}: {problem}")
    path = row.folder / part.value
    if part.kind == "audio":
        recording_seconds(path, rules.max_audio_seconds)
    else:
        read_image_size(path, rules.max_pixels)
    return Part(part.kind, str(path))


def parse_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages in the form of the OpenAI and Hugging Face chat templates.

    Raises:
        ValueError: saying which message is malformed and what was expected.
    """
    parsed = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in tuple(_ROLES):
            raise ValueError(f"message {number}: expected an object with the role user, assistant or system")
        content = message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list) or not items:
            raise ValueError(f"message {number}: content: expected a text or a list of parts")
        parts = []
        for item in items:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind not in ("text", "image", "audio") or not isinstance(item.get(kind), str):
                raise ValueError(f'message {number}: expected parts such as {{"type": "text", "text": "..."}}')
            if kind != "text" and message["role"] == "assistant":
                raise ValueError(f"message {number}: the assistant's content: expected text, found {kind}")
            parts.append(Part(kind, item[kind]))
        parsed.append(Message(message["role"], tuple(parts)))
    return parsed


@dataclass
class Encoded:
    """A chat as the model takes it: tokens, a label at each position, and its media in the order of their tokens."""

    tokens: list[int]
    labels: list[int]  # label of the *next* token, or IGNORE
    images: list[str] = field(default_factory=list)
    audios: list[str] = field(default_factory=list)
    audio_positions: list[int] = field(default_factory=list)  # positions that each recording's states take
    num_words: list[int] = field(default_factory=list)  # tokens behind each, of the words that were heard in it
    replay: bool = False  # plain text, in which every token is a label
    where: str = ""  # where it stands in the user's files
    pixels: list[torch.Tensor] = field(default_factory=list)  # the pictures themselves, where their encoder is trained
    frames: list[torch.Tensor] = field(default_factory=list)  # likewise the recordings' log-mel frames


class TooLongError(UserError):
    """A chat that takes more positions than the model has."""


class ChatEncoder:
    """Chats to tokens.

    Args:
        tokenizer: the Thinker's.
        image_positions: positions that a picture takes.
        audio_positions: positions that the states of the recording at a path take.
        words: what was heard in that recording; it stands behind them as text.
        ctx_len: most positions of a chat; the states of all its recordings together take at most a quarter of them, and
            so do their words.

    What does not fit is cut and counted: of recordings beyond their quarters the end, of text what comes last, so that
    pictures and recordings keep their positions.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_positions: int,
        audio_positions: Callable[[str], int],
        words: Callable[[str], str],
        ctx_len: int,
    ) -> None:
        self.tokenizer, self.ctx_len = tokenizer, ctx_len
        self.image_positions, self.audio_positions, self.words = image_positions, audio_positions, words
        self.begin_count()

    def begin_count(self) -> None:
        """Count from here on."""
        self.cuts = 0  # chats of which something was cut
        self.audio_cuts = 0  # recordings of which the end was cut, or all, or the last of their words
        self.text_cuts = 0  # chats of which text was cut
        self.mute = 0  # of them, those without any of their answers

    @property
    def report(self) -> str:
        """What was cut, in words."""
        return (
            f"the ends of {self.audio_cuts} recordings, text of {self.text_cuts} chats, "
            f"{self.mute} of which lost all of their answers"
        )

    def prompt(self, messages: Sequence[Message], room: int = 0) -> Encoded:
        """Everything up to where the assistant's next answer begins.

        Raises:
            TooLongError: when less than ``room`` positions are left for the answer.
        """
        encoded = self._encode(messages)
        encoded.tokens.append(self.tokenizer.special[ASSISTANT])
        encoded.labels.append(IGNORE)
        if len(encoded.tokens) > self.ctx_len - room:
            most = self.ctx_len - room
            raise TooLongError(f"the chat takes {len(encoded.tokens)} positions, expected at most {most}")
        return encoded

    def example(self, messages: Sequence[Message], where: str = "") -> Encoded:
        """A whole chat for training, cut where it is too long.

        Raises:
            UserError: when pictures and recordings alone take more than ``ctx_len`` positions.
        """
        before = self.audio_cuts
        encoded = self._encode(messages)
        encoded.where = where
        too_long = len(encoded.tokens) > self.ctx_len + 1
        if too_long:
            self._cut_text(encoded)
            self.text_cuts += 1
            self.mute += all(label == IGNORE for label in encoded.labels)
        self.cuts += too_long or self.audio_cuts > before
        # the label of a position is the token after it
        encoded.labels = encoded.labels[1:]
        encoded.tokens = encoded.tokens[:-1]
        return encoded

    def _cut_text(self, encoded: Encoded) -> None:
        """Drop text from the end until one token more than ``ctx_len`` is left, whose label alone is used."""
        media = {self.tokenizer.special[token] for token in _MEDIA.values()}
        text = [index for index, token in enumerate(encoded.tokens) if token not in media]
        room = self.ctx_len + 1 - (len(encoded.tokens) - len(text))
        if room < 1:
            where = f"{encoded.where}: " if encoded.where else ""
            raise UserError(
                f"{where}pictures and recordings alone take {self.ctx_len + 1 - room} positions, expected at most "
                f"ctx_len = {self.ctx_len}; give fewer of them, or stack more of their states in a position"
            )
        kept = text[:room]
        if kept[-1] < max(
            (index for index in range(len(encoded.tokens)) if encoded.tokens[index] in media), default=-1
        ):
            # end with text all the same: of the last token the label alone is used, and there is none to learn here
            kept[-1] = text[-1]
            encoded.labels[text[-1]] = IGNORE
        dropped = {*text} - {*kept}
        order = [index for index in range(len(encoded.tokens)) if index not in dropped]
        encoded.tokens = [encoded.tokens[index] for index in order]
        encoded.labels = [encoded.labels[index] for index in order]

    def _encode(self, messages: Sequence[Message]) -> Encoded:
        special, encoded = self.tokenizer.special, Encoded([], [])
        for message in messages:
            learned = message.role == "assistant"
            _append(encoded, [special[_ROLES[message.role]]], False)
            for part in message.parts:
                if part.kind == "text":
                    _append(encoded, self.tokenizer.encode(turn_text(part.value)), learned)
                elif part.kind == "image":
                    encoded.images.append(part.value)
                    _append(encoded, [special[IMAGE]] * self.image_positions, False)
                else:
                    self._add_recording(encoded, part.value)
            _append(encoded, [special[END]], learned)
        return encoded

    def _add_recording(self, encoded: Encoded, path: str) -> None:
        """Append a recording's states and its words, as far as there is room for them."""
        most, wanted = self.ctx_len // 4, self.audio_positions(path)
        size = min(wanted, most - sum(encoded.audio_positions))
        heard = self.words(path) if size else ""
        said = self.tokenizer.encode(turn_text(heard)) if heard else []
        words = said[: most - sum(encoded.num_words)]
        self.audio_cuts += size < wanted or len(words) < len(said)
        encoded.audios.append(path)
        encoded.audio_positions.append(size)
        encoded.num_words.append(len(words))
        _append(encoded, [self.tokenizer.special[AUDIO]] * size + words, False)


def _append(encoded: Encoded, tokens: list[int], learned: bool) -> None:
    encoded.tokens += tokens
    encoded.labels += tokens if learned else [IGNORE] * len(tokens)
