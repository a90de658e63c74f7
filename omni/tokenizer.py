"""Text as numbers: SentencePiece for the Thinker, characters for CTC, and the chat template both stages A and E use."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece

from omni.config import UserError

USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
IMAGE, AUDIO = "<|image|>", "<|audio|>"
SPECIALS = (USER, ASSISTANT, SYSTEM, END, IMAGE, AUDIO)
MAX_LINE_BYTES = 100_000  # of a line; SentencePiece learns nothing from longer ones
IGNORE = -100  # label of positions without a target


class Tokenizer:
    """SentencePiece BPE with byte fallback: any text round-trips exactly.

    The special tokens of the chat template are single symbols. Text that a user typed passes through
    :func:`plain_text` first, so that nobody can smuggle a turn into a prompt.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._pieces: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.special = {piece: int(self._pieces.piece_to_id(piece)) for piece in SPECIALS}

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of at most ``vocab_size`` pieces (fewer on a small corpus).

        Raises:
            UserError: when the text is too small or the vocabulary too small for bytes and special tokens.
        """
        writer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=writer,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                hard_vocab_limit=False,
                character_coverage=1.0,
                # an exact round trip: no normalization, no space put in front, none removed
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=[*SPECIALS, "\n"],
                pad_id=0,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                max_sentence_length=MAX_LINE_BYTES,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer.vocab_size: {vocab_size} cannot be learned from this text ({error})") from None
        return cls(writer.getvalue())

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._pieces.get_piece_size())

    @property
    def hash(self) -> str:
        """What tells two tokenizers apart; recorded in every checkpoint that depends on one."""
        return hashlib.sha256(self.model).hexdigest()[:16]

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return 0

    @property
    def end_id(self) -> int:
        """The end-of-turn token."""
        return self.special[END]

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes of text that a token stands for; a character may take several tokens."""
        piece = str(self._pieces.id_to_piece(token))
        if self._pieces.is_byte(token):
            return bytes.fromhex(piece[3:5])  # <0x41>
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return b""
        return piece.replace("\u2581", " ").encode()

    def num_bytes(self, token: int) -> int:
        """How many they are."""
        return len(self.bytes_of(token))

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in ``text`` become single ids."""
        return list(self._pieces.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._pieces.decode(list(ids)))


def plain_text(text: str) -> str:
    """User text that cannot be read as a special token: ``<|end|>`` becomes ``< |end|>``."""
    return text.replace("<|", "< |")


def turn_text(text: str) -> str:
    """What a turn of a chat says, as it stands behind the mark of its speaker: plain text with a space in front.

    With the space a word is the same token at the beginning as anywhere else. Without it an answer such as "ben" is
    another token than the " ben" it is to be copied from, and a small Thinker did not learn to look names up at all.
    """
    return plain_text(text if text.startswith((" ", "\n")) else f" {text}")


class Characters:
    """The 98 CTC symbols: blank, printable ASCII 32-126, ``<UNK>`` and pad."""

    blank, unk, pad = 0, 96, 97
    size = 98

    def knows(self, character: str) -> bool:
        """Whether a character has a symbol of its own."""
        return " " <= character <= "~"

    def encode(self, text: str) -> list[int]:
        """One symbol a character."""
        return [ord(c) - 31 if self.knows(c) else self.unk for c in text]

    def decode(self, symbols: Iterable[int]) -> str:
        """The text of symbols; blank and pad say nothing, an unknown character is written as U+FFFD."""
        return "".join(chr(s + 31) if 1 <= s <= 95 else "\ufffd" for s in symbols if s not in (self.blank, self.pad))


def needed_steps(symbols: Sequence[int]) -> int:
    """CTC steps that a target needs: one a symbol, and a blank between equal neighbours."""
    return len(symbols) + sum(a == b for a, b in itertools.pairwise(symbols))


class _NotSpoken(dict[int, str]):
    """For ``str.translate``: punctuation and symbols of any script become a space; all else stays as it is."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character)[0] in "PS" else character
        return self[code]


_NOT_SPOKEN = _NotSpoken({ord("'"): "'", ord("\u2019"): "'"})


def spoken_text(text: str) -> str:
    """Text as it sounds: lowercase, no punctuation but apostrophes, single spaces. Used for CTC targets and for WER."""
    text = text.lower().translate(_NOT_SPOKEN)
    return " ".join(re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text).split())
