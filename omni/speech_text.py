"""Text as the Talker speaks it: digits and symbols as words, words and the pauses between them.

A sentence becomes alternating pauses and words, " ", "the", " ", "red", ",", "then", ".": each pause is one character
(a space, or the punctuation mark that stands there), each word the letters a-z and the apostrophe. The Talker gives
every one of them a duration.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from num2words import num2words

from omni.config import UserError

MAX_WORDS = 30  # of a chunk that is spoken in one piece, unless a sentence or a phrase ends before
MAX_CHARACTERS = 20_000  # more is refused: half an hour of speech is no longer an answer

_SYMBOLS = {
    "&": "and", "%": "percent", "+": "plus", "=": "equals", "@": "at", "$": "dollars", "€": "euros", "£": "pounds",
    "#": "number", "°": "degrees", "×": "times", "÷": "divided by", "<": "less than", ">": "greater than",
    "μ": "micro", "½": "one half", "¼": "one quarter",
}  # fmt: skip
_PLAIN = str.maketrans({"’": "'", "‘": "'", "…": ".", "—": ",", "–": ",", "ß": "ss", "æ": "ae", "ø": "o", "œ": "oe"})
_NUMBER = re.compile(r"(?P<ordinal>\d+)(?:st|nd|rd|th)\b|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
_MARKS = ".,?!;:"
_LONGEST_WORD = 30  # letters; no English word is longer, and a keyboard smash needs no single breath
_LONGEST_NUMBER = 15  # digits; longer ones are read digit by digit


@dataclass(frozen=True)
class SpokenWord:
    """One word to be spoken.

    Attributes:
        letters: a-z and apostrophes.
        pause: the character of the pause after it: a space, or a punctuation mark.
        end: where in the source text it ends; the state of the token there is the word's state.
    """

    letters: str
    pause: str
    end: int


def spoken_words(text: str) -> list[SpokenWord]:
    """The words of a text, with digits, symbols, accents and case resolved; other scripts and emoji are left out."""
    words: list[SpokenWord] = []
    for found in re.finditer(r"\S+", text):
        pieces = _readable(found[0])
        letters = [word for piece in pieces for word in _cut(piece)]
        mark = next((c for c in reversed(found[0].translate(_PLAIN).rstrip("\"')]}*_")[-1:]) if c in _MARKS), " ")
        for number, word in enumerate(letters):
            words.append(SpokenWord(word, mark if number == len(letters) - 1 else " ", found.end()))
        if not letters and mark != " " and words:  # a mark that stands alone, as in "wait - what"
            words[-1] = SpokenWord(words[-1].letters, mark, words[-1].end)
    return words


def units(words: list[SpokenWord]) -> list[str]:
    """Pauses and words in turn, beginning and ending with a pause."""
    return [" ", *(part for word in words for part in (word.letters, word.pause))]


def chunks(text: str) -> list[list[SpokenWord]]:
    """The words of a text in pieces of at most ``MAX_WORDS`` (see :func:`ends_chunk`).

    Raises:
        UserError: when there is nothing to say, or far too much.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"text: found {len(text)} characters, expected at most {MAX_CHARACTERS} to speak")
    words = spoken_words(text)
    if not words:
        raise nothing_to_speak(text)
    return list(_pieces(words))


def nothing_to_speak(text: str) -> UserError:
    """What to say of a text without words."""
    shown = text if len(text) <= 40 else text[:37] + "..."
    return UserError(f"text: found nothing to speak in {shown!r}, expected words in Latin letters, or numbers")


def ends_chunk(num_words: int, pause: str) -> bool:
    """Whether a chunk of so many words ends at this pause, without a look at what comes after it."""
    return num_words >= MAX_WORDS or (pause in ".?!" and num_words >= 10) or (pause in _MARKS and num_words >= 20)


def _pieces(words: list[SpokenWord]) -> Iterator[list[SpokenWord]]:
    piece: list[SpokenWord] = []
    for word in words:
        piece.append(word)
        if ends_chunk(len(piece), word.pause):
            yield piece
            piece = []
    if piece:
        yield piece


def _readable(token: str) -> list[str]:
    """The words of one token: lowercase letters and apostrophes."""
    token = token.translate(_PLAIN)
    token = re.sub(r"\$(\d[\d,.]*)", r"\1 dollars", token)
    token = _NUMBER.sub(lambda found: f" {_number_words(found)} ", token)
    for symbol, name in _SYMBOLS.items():
        token = token.replace(symbol, f" {name} ")
    token = unicodedata.normalize("NFKD", token).lower()
    token = "".join(c for c in token if not unicodedata.combining(c))
    parts = (part.strip("'") for part in re.split(r"[^a-z']+", token))
    return [part for part in parts if part]


def _number_words(found: re.Match[str]) -> str:
    digits = found[0].replace(",", "")
    if found["ordinal"] and len(found["ordinal"]) <= _LONGEST_NUMBER:
        return str(num2words(int(found["ordinal"]), to="ordinal"))
    if len(digits) > _LONGEST_NUMBER or (len(digits) > 1 and digits[0] == "0" and "." not in digits):
        return " ".join(str(num2words(int(c))) for c in digits if c.isdigit())
    return str(num2words(float(digits) if "." in digits else int(digits)))


def _cut(word: str) -> list[str]:
    return [word[start : start + _LONGEST_WORD] for start in range(0, len(word), _LONGEST_WORD)]
