"""What a prompt is made of, for people: marks of the template, words, pictures, recordings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omni.data.dialogue import Encoded
from omni.tokenizer import AUDIO, IMAGE, SPECIALS, Tokenizer

PieceKind = Literal["mark", "text", "image", "audio", "words"]


@dataclass(frozen=True)
class PromptPiece:
    """A stretch of a prompt: a mark of the template, one token of text or of the words that were heard in a recording,
    or all positions of a picture or recording."""

    kind: PieceKind
    text: str
    positions: int


def prompt_pieces(prompt: Encoded, tokenizer: Tokenizer, image_positions: int) -> list[PromptPiece]:
    """The stretches of a prompt, in order; ``image_positions`` is what a picture takes."""
    special = {tokenizer.special[mark]: mark for mark in SPECIALS}
    images = iter(prompt.images)
    recordings = zip(prompt.audios, prompt.audio_positions, prompt.num_words, strict=True)
    audios = (recording for recording in recordings if recording[1])  # else it was cut away
    found: list[PromptPiece] = []
    at = words_until = 0
    while at < len(prompt.tokens):
        mark = special.get(prompt.tokens[at], "")
        if mark == IMAGE:
            found.append(PromptPiece("image", next(images), image_positions))
        elif mark == AUDIO:
            name, size, num_words = next(audios)
            found.append(PromptPiece("audio", name, size))
            words_until = at + size + num_words
        elif mark:
            found.append(PromptPiece("mark", mark, 1))
        else:
            text = tokenizer.bytes_of(prompt.tokens[at]).decode("utf-8", "replace")
            found.append(PromptPiece("words" if at < words_until else "text", text, 1))
        at += found[-1].positions
    return found
