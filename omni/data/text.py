"""Text for stage A: documents, packed into windows of tokens that are mapped from disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni.config import UserError
from omni.data.manifest import read_text_file
from omni.data.stream import Batch
from omni.tokenizer import Tokenizer


@dataclass
class TextBatch(Batch):
    """Windows of packed text: ``labels_BT[b, t]`` is the token that follows ``tokens_BT[b, t]``."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor


def read_text(path: str | Path) -> str:
    """A text file, or all ``*.txt`` files of a folder in the order of their names.

    Raises:
        UserError: when there is none, or one is empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_dir():
        return read_text_file(path)
    files = sorted(path.glob("*.txt"))
    if not files:
        raise UserError(f"{path}: found no *.txt file in this folder, expected at least one")
    return "\n\n".join(read_text_file(file).strip("\n") for file in files) + "\n"


def split_text(text: str, share: float) -> tuple[str, str]:
    """The last ``share`` of a text, from a line's beginning on, for validation."""
    at = text.rfind("\n", 0, int(len(text) * (1 - share))) + 1
    at = at or int(len(text) * (1 - share))
    return text[:at], text[at:]


def learn_tokenizer(text: str, vocab_size: int, cache: Path) -> Tokenizer:
    """The tokenizer of a text, learned once and kept in ``cache``."""
    key = hashlib.sha256(f"{vocab_size}\n{text}".encode()).hexdigest()[:16]
    path = cache / f"tokenizer-{key}.model"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(Tokenizer.train(text.splitlines(), vocab_size).model)
        partial.replace(path)
    return Tokenizer(path.read_bytes())


def tokenize(text: str, tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """All tokens of ``text`` as uint16 or uint32, mapped from a file in ``cache`` that is written once."""
    kind = np.uint16 if tokenizer.vocab_size < 2**16 else np.uint32
    key = hashlib.sha256(tokenizer.model + text.encode()).hexdigest()[:16]
    path = cache / f"tokens-{key}.bin"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # line by line: SentencePiece needs memory in proportion to its longest input
        tokens = [token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line)]
        partial = path.with_suffix(".partial")
        np.asarray(tokens, dtype=kind).tofile(partial)
        partial.replace(path)
    return np.memmap(path, dtype=kind, mode="r")


class PackedText:
    """Windows of ``ctx_len`` tokens; in training each epoch cuts them at another offset."""

    def __init__(self, tokens: np.ndarray, ctx_len: int) -> None:
        if len(tokens) < ctx_len + 2:
            raise UserError(f"the text has {len(tokens)} tokens, expected at least ctx_len + 2 = {ctx_len + 2}")
        self.tokens, self.ctx_len = tokens, ctx_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.ctx_len

    def sample(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        """Tokens [ctx_len + 1] of window ``index``, shifted at random in training."""
        start = index * self.ctx_len + (0 if rng is None else int(rng.integers(0, self.ctx_len)))
        start = min(start, len(self.tokens) - self.ctx_len - 1)
        return np.asarray(self.tokens[start : start + self.ctx_len + 1], dtype=np.int64)

    def collate(self, samples: list[Any]) -> TextBatch:
        """Stack windows."""
        windows = torch.from_numpy(np.stack(samples))
        return TextBatch({"tokens": windows[:, 1:].numel()}, windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
