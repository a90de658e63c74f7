"""What training and held-out data share: figures of what a model has seen say nothing about what it has not.

The same recording or picture, by its bytes, is an error unless ``data.allow_leaks`` is set; the same text is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from omni.config import DataConfig
from omni.console import log
from omni.data.dialogue import Chat
from omni.data.manifest import Row, first_problems, raise_problems
from omni.files import content_digest
from omni.parallel import map_small


class Medium(NamedTuple):
    """A recording or picture, and the line that names it."""

    where: str
    path: Path


class Text(NamedTuple):
    """A transcript, caption, chat or document, and the line on which it begins."""

    where: str
    words: str


@dataclass(frozen=True)
class Part:
    """What training or held-out data consist of."""

    media: Sequence[Medium]
    texts: Sequence[Text]


@dataclass(frozen=True)
class Leaks:
    """What two parts share: a line for each recording or picture, and one line for all texts."""

    media: list[str]
    texts: list[str]


def part_of_rows(rows: Sequence[Row], file_column: str, text_column: str) -> Part:
    """Rows of recordings (``wav``, ``text``) or pictures (``image``, ``caption``)."""
    media = [Medium(row.where, row.path(file_column)) for row in rows]
    return Part(media, [Text(row.where, str(row.values[text_column])) for row in rows])


def part_of_chats(chats: Sequence[Chat]) -> Part:
    """Chats: their pictures and recordings, and what is said in those that have none."""
    media = [Medium(chat.where, Path(path)) for chat in chats for path in chat.media]
    texts = [
        Text(chat.where, " ".join(part.value for message in chat.messages for part in message.parts))
        for chat in chats
        if not chat.media
    ]
    return Part(media, texts)


def part_of_text(text: str, name: str) -> Part:
    """The documents of a text, which blank lines separate; ``name`` is its file's."""
    texts, line = [], 1
    for document in text.split("\n\n"):
        texts.append(Text(f"{name}:{line + len(document) - len(document.lstrip(chr(10)))}", document))
        line += document.count("\n") + 2
    return Part([], [text for text in texts if text.words.strip()])


def find_leaks(train: Part, held_out: Part) -> Leaks:
    """Everything that two parts share."""
    media = [
        f"{held.where}: the same file as {trained.where} ({held.path.name}), "
        "expected different ones in training and held-out data; remove one, or set data.allow_leaks"
        for held, trained in shared_media(train.media, held_out.media)
    ]
    places = {" ".join(text.words.split()).casefold(): text.where for text in reversed(train.texts)}
    same = [text for text in held_out.texts if " ".join(text.words.split()).casefold() in places]
    if not same:
        return Leaks(media, [])
    first = places[" ".join(same[0].words.split()).casefold()]
    share = f"{len(same)} of {len(held_out.texts)} texts here are in the training data too"
    return Leaks(media, [f"{same[0].where}: warning: {share}, expected none; the first is that of {first}"])


def refuse_leaks(train: Part, held_out: Part, rules: DataConfig) -> None:
    """Stop before a model is judged by what it was trained on; shared texts are a warning.

    Raises:
        BadSamplesError: listing each held-out recording or picture that is a training one too, unless the rules allow.
    """
    leaks = find_leaks(train, held_out)
    if not rules.allow_leaks:
        raise_problems(leaks.media)
    for line in [*first_problems(leaks.media), *leaks.texts]:
        log.warning("%s", line)


def shared_media(train: Iterable[Medium], held_out: Iterable[Medium]) -> list[tuple[Medium, Medium]]:
    """(held-out, training) pairs of the same bytes; each held-out file once, with the first such line of training."""
    parts = [{medium.path: medium for medium in reversed(list(part))} for part in (train, held_out)]
    paths = list(dict.fromkeys(path for part in parts for path in part if path.is_file()))
    contents = dict(zip(paths, contents_of(paths), strict=True))
    trained = {contents[path]: medium for path, medium in parts[0].items() if path in contents}
    return [
        (medium, trained[contents[path]])
        for path, medium in reversed(parts[1].items())
        if path in contents and contents[path] in trained
    ]


def contents_of(paths: Sequence[Path]) -> list[Path | bytes]:
    """Something for each file that is equal where their bytes are; only files of equal sizes are read."""
    sizes = {path: path.stat().st_size for path in paths}
    times = Counter(sizes.values())
    alike = [path for path, size in sizes.items() if times[size] > 1]
    digests = dict(zip(alike, map_small(content_digest, alike), strict=True))
    return [digests.get(path, path) for path in paths]
