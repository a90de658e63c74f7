"""Text for stage A: documents, packed into windows of tokens that are mapped from disk."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from omni import ranks
from omni.atomic import whole_file, write_whole
from omni.config import DataConfig, UserError
from omni.data.manifest import RULES, problems_of, raise_problems, read_text_file, settle, too_long
from omni.data.stream import Batch
from omni.files import file_problem
from omni.models.segments import Segments
from omni.tokenizer import ASSISTANT, END, IGNORE, MAX_LINE_BYTES, SYSTEM, USER, Tokenizer


@dataclass
class TextBatch(Batch):
    """Windows of packed text.

    Attributes:
        tokens_BT: tokens.
        labels_BT: the token that follows each of them, IGNORE where none does.
        answers_BT: True where that token is the assistant's, by the markup of chats.
        segments: the documents of the windows, where they do not see each other; None: each window is one.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    answers_BT: torch.Tensor
    segments: Segments | None = None


def scan_text(path: str | Path, rules: DataConfig = RULES) -> tuple[str, list[str]]:
    """A text file, or all ``*.txt`` files of a folder in the order of their names; and the problems of their lines.

    Lines that are too long are not in the text.

    Raises:
        UserError: when there is no such file, or listing what cannot be read in them.
    """
    path = Path(path)
    if file_problem(path) != "found a folder":
        return _without_long_lines(path, rules)
    files = sorted(path.glob("*.txt"))
    if not files:
        raise UserError(f"{path}: found no *.txt file in this folder, expected at least one")
    parts, problems, unreadable = [], list[str](), list[str]()
    for file in files:
        try:
            part, more = _without_long_lines(file, rules)
        except UserError as error:
            unreadable += problems_of(error)
            continue
        parts.append(part.strip("\n"))
        problems += more
    if unreadable:
        raise_problems([*unreadable, *problems])
    return "\n\n".join(parts) + "\n", problems


def read_text(path: str | Path, rules: DataConfig = RULES) -> str:
    """A text file, or all ``*.txt`` files of a folder in the order of their names.

    Raises:
        UserError: when there is none, one is empty or not UTF-8, or lines are too long, unless the rules leave these
            out.
    """
    text, problems = scan_text(path, rules)
    settle(problems, len(problems), len(problems) + text.count("\n"), rules, str(path))
    if not text.strip():
        raise UserError(f"{path}: nothing is left without the lines that are too long, expected some text")
    return text


def _without_long_lines(path: Path, rules: DataConfig) -> tuple[str, list[str]]:
    """A file's text without the lines that are longer than ``max_text_chars``, and a problem for each of these."""
    text, most = read_text_file(path), rules.max_text_chars
    kept, problems, begin, at = [], list[str](), 0, 0
    while len(text) - at > most:
        # a window of one character more than allowed, with no line's end in it, is in a line that is too long
        line_end = text.rfind("\n", at, at + most + 1)
        if line_end < 0:
            line_end = text.find("\n", at)
            line_end = len(text) if line_end < 0 else line_end
            problems.append(f"{path}:{text.count(chr(10), 0, at) + 1}: {too_long(line_end - at, rules)}")
            kept.append(text[begin:at])
            begin = line_end + 1
        at = line_end + 1
    return "".join([*kept, text[begin:]]) if problems else text, problems


def split_text(text: str, share: float) -> tuple[str, str]:
    """The last ``share`` of a text, from a line's beginning on, for validation."""
    at = text.rfind("\n", 0, int(len(text) * (1 - share))) + 1
    at = at or int(len(text) * (1 - share))
    return text[:at], text[at:]


def pieces(line: str) -> Iterator[str]:
    """A line as it is, or in pieces of at most ``MAX_LINE_BYTES`` where it is longer.

    They begin at a space, as tokens do, so that they make the tokens of the line; where no space is near, anywhere.
    """
    most = MAX_LINE_BYTES // 4  # characters, of 4 bytes at most
    start = 0
    while len(line) - start > most:
        end = line.rfind(" ", start + 1, start + most + 1)
        while end > start and line[end - 1] == " ":  # several spaces may be one token
            end -= 1
        end = end if end > start else start + most
        yield line[start:end]
        start = end
    yield line[start:]


def beside(path: str, name: str | None) -> str | None:
    """A file's path in the folder of another (an absolute one stays what it is); None where there is no such file."""
    found = Path(path).parent / name if name else None
    return str(found) if found and found.exists() else None


def learn_tokenizer(text: str, vocab_size: int, cache: Path) -> Tokenizer:
    """The tokenizer of a text, learned once and kept in ``cache``."""
    key = hashlib.sha256(f"{vocab_size}\n{text}".encode()).hexdigest()[:16]
    path = cache / f"tokenizer-{key}.model"
    with ranks.first():
        if not path.exists():
            lines = (piece for line in text.splitlines() for piece in pieces(line))
            write_whole(path, Tokenizer.train(lines, vocab_size).model)
    return Tokenizer(path.read_bytes())


def tokenize(text: str, tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """All tokens of ``text`` as uint16 or uint32, mapped from a file in ``cache`` that is written once."""
    kind = np.uint16 if tokenizer.vocab_size < 2**16 else np.uint32
    key = hashlib.sha256(tokenizer.model + text.encode()).hexdigest()[:16]
    path = cache / f"tokens-{key}.bin"
    with ranks.first():
        if not path.exists():
            with whole_file(path) as partial, partial.open("wb") as file:
                # piece by piece: SentencePiece needs memory in proportion to its longest input
                for line in text.splitlines(keepends=True):
                    for piece in pieces(line):
                        file.write(np.asarray(tokenizer.encode(piece), dtype=kind).tobytes())
    return np.memmap(path, dtype=kind, mode="r")


def document_spans(tokens: np.ndarray, tokenizer: Tokenizer, longest: int) -> list[tuple[int, int]]:
    """First token and end of every document, its blank line included; longer ones come in pieces of ``longest``."""
    line_end = tokenizer.encode("\n")[-1]
    ends = np.flatnonzero((tokens[1:] == line_end) & (tokens[:-1] == line_end)) + 2
    edges = np.unique(np.concatenate([[0], ends, [len(tokens)]])).tolist()
    spans = [
        (start, min(start + longest, end))
        for first, end in itertools.pairwise(edges)
        for start in range(first, end, longest)
    ]
    return [(start, end) for start, end in spans if end - start > 1]


def fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices of things of ``sizes``, grouped so that no group is larger than ``room`` and few are needed.

    Largest first, each into the fullest group that has room for it ("best-fit decreasing"; for texts: Ding et al.,
    2024, "Fewer truncations improve language modeling").
    """
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # groups that have so much room left
    rooms: list[int] = []  # the keys, sorted
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        at = bisect.bisect_left(rooms, sizes[index])
        if at == len(rooms):
            groups.append([])
            left, group = room, len(groups) - 1
        else:
            left = rooms[at]
            group = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[at]
        groups[group].append(index)
        left -= sizes[index]
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(group)
    return groups


def fit_in_order(sizes: Sequence[int], room: int) -> list[list[int]]:
    """As :func:`fit`, but the groups follow one another as the things do."""
    groups: list[list[int]] = []
    left = 0
    for index, size in enumerate(sizes):
        if size > left:
            groups.append([])
            left = room
        groups[-1].append(index)
        left -= size
    return groups


Order = Literal["best", "lessons", "text"]  # how far documents may be moved to fill windows
_NEAR = 256  # documents that a lesson has at the least


def arranged(sizes: Sequence[int], room: int, order: Order) -> list[list[int]]:
    """Groups of things that fit into ``room``: the fewest; the fewest of near ones, in order; or all in their order.

    Of 12,000 documents of half a window each, as a primer has them, the windows are full to 0.99, 0.96 and 0.81.
    """
    if order == "text":
        return fit_in_order(sizes, room)
    run = _NEAR if order == "lessons" else len(sizes)
    starts = range(0, len(sizes), max(1, run))
    return [[start + index for index in group] for start in starts for group in fit(sizes[start : start + run], room)]


def is_answer(tokens_BT: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """True [B, T] where the last mark of a turn so far is the assistant's."""
    turns = [tokenizer.special[token] for token in (USER, ASSISTANT, SYSTEM, END)]
    places_BT = np.where(np.isin(tokens_BT, turns), np.arange(tokens_BT.shape[1]), -1)
    last_BT = np.maximum.accumulate(places_BT, axis=1)
    mark_BT = np.take_along_axis(tokens_BT, np.maximum(last_BT, 0), axis=1)
    return (last_BT >= 0) & (mark_BT == tokenizer.special[ASSISTANT])


def _text_batch(
    tokens: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer, segments: Segments | None = None
) -> TextBatch:
    answers = is_answer(tokens, tokenizer) & (labels != IGNORE)
    counts = {"tokens": int((labels != IGNORE).sum()), "answers": int(answers.sum())}
    tokens_BT, labels_BT, answers_BT = (
        torch.from_numpy(np.ascontiguousarray(part)) for part in (tokens, labels, answers)
    )
    return TextBatch(counts, tokens_BT, labels_BT, answers_BT, segments)


class PackedDocuments:
    """Windows of ``ctx_len`` tokens that hold whole documents, which do not see each other.

    Cut documents would ask about what stands before the cut, and teach a model to guess.

    Args:
        tokens: all of the text; blank lines separate documents.
        ctx_len: tokens a window; documents that are longer are cut.
        tokenizer: the one they were made with.
        order: of the documents, for :func:`arranged`; that of the text is for evaluation.
    """

    def __init__(self, tokens: np.ndarray, ctx_len: int, tokenizer: Tokenizer, order: Order = "best") -> None:
        self.tokens, self.ctx_len, self.tokenizer = tokens, ctx_len, tokenizer
        self.spans = document_spans(tokens, tokenizer, ctx_len)
        self.windows = arranged([end - start for start, end in self.spans], ctx_len, order)

    def __len__(self) -> int:
        return len(self.windows)

    def where(self, index: int) -> str:
        """The documents of a window, each by how it begins."""
        return "the documents " + ", ".join(
            _quoted(self.tokens[slice(*self.spans[member])], self.tokenizer) for member in self.windows[index]
        )

    def sample(self, index: int, rng: np.random.Generator | None) -> list[np.ndarray]:
        """The documents of window ``index``, in random order in training."""
        members = self.windows[index] if rng is None else rng.permutation(self.windows[index]).tolist()
        return [np.asarray(self.tokens[slice(*self.spans[member])], dtype=np.int64) for member in members]

    def collate(self, samples: list[Any]) -> TextBatch:
        """Put the documents of each window one after the other; what is left is a document without labels."""
        shape = len(samples), self.ctx_len
        tokens, labels = np.full(shape, self.tokenizer.pad_id), np.full(shape, IGNORE)
        lengths: list[int] = []
        for row, window in enumerate(samples):
            at = 0
            for document in window:
                end = at + len(document)
                tokens[row, at:end] = document
                lengths.append(len(document))
                at = end
            labels[row, : at - 1] = tokens[row, 1:at]
            lengths.append(self.ctx_len - at)
        return _text_batch(tokens, labels, self.tokenizer, Segments(lengths))


class PackedText:
    """Windows of ``ctx_len`` tokens of a text that is one; in training each epoch cuts them at another offset.

    Args:
        tokens: all of the text.
        ctx_len: tokens a window.
        tokenizer: the one they were made with; it knows the markup of chats.
    """

    def __init__(self, tokens: np.ndarray, ctx_len: int, tokenizer: Tokenizer) -> None:
        if len(tokens) < ctx_len + 2:
            raise UserError(f"the text has {len(tokens)} tokens, expected at least ctx_len + 2 = {ctx_len + 2}")
        self.tokens, self.ctx_len, self.tokenizer = tokens, ctx_len, tokenizer

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.ctx_len

    def where(self, index: int) -> str:
        """A window by its tokens and how it begins."""
        start = index * self.ctx_len
        return f"the text at token {start}, {_quoted(self.tokens[start:], self.tokenizer)}"

    def sample(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        """Tokens [ctx_len + 1] of window ``index``, shifted at random in training."""
        start = index * self.ctx_len + (0 if rng is None else int(rng.integers(0, self.ctx_len)))
        start = min(start, len(self.tokens) - self.ctx_len - 1)
        return np.asarray(self.tokens[start : start + self.ctx_len + 1], dtype=np.int64)

    def collate(self, samples: list[Any]) -> TextBatch:
        """Stack windows."""
        windows = np.stack(samples)
        tokens_BT = windows[:, :-1]
        return _text_batch(tokens_BT, windows[:, 1:], self.tokenizer)


def _quoted(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The beginning of a text, for a message."""
    return json.dumps(tokenizer.decode(tokens[:12].tolist()), ensure_ascii=False)


def packed(
    tokens: np.ndarray, ctx_len: int, tokenizer: Tokenizer, separate_documents: bool, order: Order = "best"
) -> PackedText | PackedDocuments:
    """The windows of a text, of whole documents if these are to be kept apart."""
    if separate_documents:
        return PackedDocuments(tokens, ctx_len, tokenizer, order)
    return PackedText(tokens, ctx_len, tokenizer)
