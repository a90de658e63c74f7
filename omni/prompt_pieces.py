"""What a prompt is made of, for people: marks of the template, words, pictures, recordings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omni.data.dialogue import Encoded
from omni.tokenizer import AUDIO, IMAGE, SPECIALS, Tokenizer


@dataclass(frozen=True)
class PromptPiece:
    """A stretch of a prompt: a mark of the template, one token of text, or all positions of a picture or recording."""

    kind: Literal["mark", "text", "image", "audio"]
    text: str
    positions: int


def prompt_pieces(prompt: Encoded, tokenizer: Tokenizer, image_positions: int) -> list[PromptPiece]:
    """The stretches of a prompt, in order; ``image_positions`` is what a picture takes."""
    special = {tokenizer.special[mark]: mark for mark in SPECIALS}
    names = {"image": iter(prompt.images), "audio": iter(prompt.audios)}
    sizes = {"image": iter([image_positions] * len(prompt.images)), "audio": iter(prompt.audio_positions)}
    found: list[PromptPiece] = []
    at = 0
    while at < len(prompt.tokens):
        mark = special.get(prompt.tokens[at], "")
        if mark in (IMAGE, AUDIO):
            kind: Literal["image", "audio"] = "image" if mark == IMAGE else "audio"
            found.append(PromptPiece(kind, next(names[kind]), next(sizes[kind])))
        elif mark:
            found.append(PromptPiece("mark", mark, 1))
        else:
            text = tokenizer.bytes_of(prompt.tokens[at]).decode("utf-8", "replace")
            found.append(PromptPiece("text", text, 1))
        at += found[-1].positions
    return found
