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

import numpy as np
import torch

from omni.audio import recording_seconds
from omni.config import DataConfig, UserError
from omni.data.entries import type_name
from omni.data.images import read_image_size
from omni.data.manifest import RULES, Manifest, Row, path_problem, scan_jsonl, too_long
from omni.data.stream import Batch, pad_to
from omni.tokenizer import ASSISTANT, AUDIO, END, IGNORE, IMAGE, SYSTEM, USER, Tokenizer, needed_steps, turn_text

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
    audio_positions: list[int] = field(default_factory=list)  # positions that each recording takes
    transcript: list[int] = field(default_factory=list)  # of its only recording, where it is known and fits there
    replay: bool = False  # plain text, in which every token is a label
    where: str = ""  # where it stands in the user's files


class TooLongError(UserError):
    """A chat that takes more positions than the model has."""


class ChatEncoder:
    """Chats to tokens.

    Args:
        tokenizer: the Thinker's.
        image_positions: positions that a picture takes.
        audio_positions: positions that the recording at a path takes.
        ctx_len: most positions of a chat; all its recordings together take at most a quarter of them.
    """

    def __init__(
        self, tokenizer: Tokenizer, image_positions: int, audio_positions: Callable[[str], int], ctx_len: int
    ) -> None:
        self.tokenizer = tokenizer
        self.image_positions, self.audio_positions, self.ctx_len = image_positions, audio_positions, ctx_len
        self.cuts = 0  # chats of which something was cut
        self.unfit = 0  # transcripts with more tokens than CTC can write into the positions of their recording

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

    def example(self, messages: Sequence[Message], transcript: str = "", where: str = "") -> Encoded:
        """A whole chat for training, cut at the end where it is too long; ``transcript`` is of its only recording."""
        encoded = self._encode(messages)
        encoded.where = where
        if transcript and len(encoded.audios) == 1:
            spoken = self.tokenizer.encode(turn_text(transcript))
            if needed_steps(spoken) <= encoded.audio_positions[0]:
                encoded.transcript = spoken
            else:
                self.unfit += 1
        if len(encoded.tokens) > self.ctx_len + 1:
            self.cuts += 1
            media = {self.tokenizer.special[token] for token in _MEDIA.values()}
            if media.intersection(encoded.tokens[self.ctx_len :]):
                raise UserError(f"pictures and recordings alone take more than ctx_len = {self.ctx_len} positions")
        # the label of a position is the token after it
        encoded.tokens = encoded.tokens[: self.ctx_len + 1]
        encoded.labels = encoded.labels[1 : len(encoded.tokens)]
        encoded.tokens = encoded.tokens[:-1]
        return encoded

    def _encode(self, messages: Sequence[Message]) -> Encoded:
        special, encoded = self.tokenizer.special, Encoded([], [])
        audio_left = self.ctx_len // 4
        for message in messages:
            learned = message.role == "assistant"
            _append(encoded, [special[_ROLES[message.role]]], False)
            for part in message.parts:
                if part.kind == "text":
                    _append(encoded, self.tokenizer.encode(turn_text(part.value)), learned)
                    continue
                wanted = self.image_positions if part.kind == "image" else self.audio_positions(part.value)
                size = wanted if part.kind == "image" else min(wanted, audio_left)
                if part.kind == "image":
                    encoded.images.append(part.value)
                else:
                    audio_left -= size
                    self.cuts += size < wanted
                    encoded.audios.append(part.value)
                    encoded.audio_positions.append(size)
                _append(encoded, [special[_MEDIA[part.kind]]] * size, False)
            _append(encoded, [special[END]], learned)
        return encoded


def _append(encoded: Encoded, tokens: list[int], learned: bool) -> None:
    encoded.tokens += tokens
    encoded.labels += tokens if learned else [IGNORE] * len(tokens)


@dataclass
class ChatBatch(Batch):
    """Chats padded on the right (training) or left (generation), and the encoder features of their media.

    Attributes:
        tokens_BT: tokens; placeholders where media stand.
        labels_BT: the next token where the assistant speaks, IGNORE elsewhere.
        replay_B: True for plain text.
        valid_BT: False at padding.
        patches_NPD: patch tokens of all pictures of the batch, in the order of their placeholders.
        states_NTD: audio encoder states of all recordings, padded with zeros.
        positions_N: positions that each recording takes.
        transcripts_NS: tokens of each recording's transcript, padded.
        num_transcript_N: how many; 0 where there is none, or none that fits.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    replay_B: torch.Tensor
    valid_BT: torch.Tensor
    patches_NPD: torch.Tensor
    states_NTD: torch.Tensor
    positions_N: torch.Tensor
    transcripts_NS: torch.Tensor
    num_transcript_N: torch.Tensor


Features = Callable[[str], torch.Tensor]


def collate_chats(
    chats: Sequence[Encoded],
    image_features: Features,
    audio_features: Features,
    pad_id: int,
    left: bool = False,
    multiple: int = 16,
) -> ChatBatch:
    """One batch from encoded chats; features come from whatever computed or kept them."""
    B, T = len(chats), max(len(chat.tokens) for chat in chats)
    T = T if left else pad_to(T, multiple)
    tokens, labels = torch.full((B, T), pad_id), torch.full((B, T), IGNORE)
    valid = torch.zeros(B, T, dtype=torch.bool)
    for row, chat in enumerate(chats):
        size = len(chat.tokens)
        where = slice(T - size, T) if left else slice(0, size)
        tokens[row, where] = torch.tensor(chat.tokens)
        labels[row, where] = torch.tensor(chat.labels)
        valid[row, where] = True
    transcripts = [chat.transcript for chat in chats for _ in chat.audios]
    transcripts_NS = torch.zeros(len(transcripts), max(map(len, transcripts), default=0), dtype=torch.long)
    for row, spoken in enumerate(transcripts):
        transcripts_NS[row, : len(spoken)] = torch.tensor(spoken, dtype=torch.long)
    images = [image_features(path) for chat in chats for path in chat.images]
    audios = [audio_features(path) for chat in chats for path in chat.audios]
    positions = [size for chat in chats for size in chat.audio_positions]
    states = torch.zeros(
        len(audios), max((len(item) for item in audios), default=0), audios[0].shape[1] if audios else 0
    )
    for row, item in enumerate(audios):
        states[row, : len(item)] = item
    replay = torch.tensor([chat.replay for chat in chats])
    num_labels_B = (labels != IGNORE).sum(1)
    counts = {
        "answers": int(num_labels_B[~replay].sum()),
        "replay": int(num_labels_B[replay].sum()),
        "transcripts": sum(map(len, transcripts)),
        "tokens": int(valid.sum()),
    }
    return ChatBatch(
        counts,
        tokens,
        labels,
        replay,
        valid,
        torch.stack(images) if images else torch.zeros(0, 0, 0),
        states,
        torch.tensor(positions, dtype=torch.long),
        transcripts_NS,
        torch.tensor([len(spoken) for spoken in transcripts], dtype=torch.long),
    )


class ChatSamples:
    """Chats as training samples, each task as often as its weight says, mixed with documents of stage A's text.

    Args:
        chats: encoded chats.
        tasks: the task of each.
        task_weights: how often a task's chats occur in an epoch (1: once); tasks not named have weight 1.
        replay: windows of text as encoded chats whose every token is a label; ``replay_share`` of all samples.
    """

    def __init__(
        self,
        chats: Sequence[Encoded],
        tasks: Sequence[str],
        task_weights: dict[str, float],
        collate: Callable[[Sequence[Encoded]], ChatBatch],
        replay: Sequence[Encoded] = (),
        replay_share: float = 0.0,
    ) -> None:
        unknown = [task for task in task_weights if task not in tasks]
        if unknown:
            raise UserError(f"task_weights: found {unknown[0]!r}, expected one of {', '.join(sorted(set(tasks)))}")
        self._collate = collate
        picks: list[Encoded] = []
        for task in sorted(set(tasks)):
            group = [chat for chat, name in zip(chats, tasks, strict=True) if name == task]
            wanted = round(len(group) * task_weights.get(task, 1.0))
            picks += [group[i % len(group)] for i in range(wanted)]
        self.num_chats = len(picks)
        wanted = round(self.num_chats * replay_share / (1 - replay_share)) if replay else 0
        self.samples = picks + [replay[i % len(replay)] for i in range(wanted)]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """Positions of each sample, for batches of similar length."""
        return [len(chat.tokens) for chat in self.samples]

    def where(self, index: int) -> str:
        """``file:line`` of a chat, or which replayed text it is."""
        return self.samples[index].where

    def sample(self, index: int, rng: np.random.Generator | None) -> Encoded:
        """An encoded chat or window of text."""
        return self.samples[index]

    def collate(self, samples: list[Any]) -> ChatBatch:
        """One right-padded batch."""
        return self._collate(samples)
