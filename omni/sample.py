"""Something that a model did, to read, to see and to hear: in the terminal, on a page, in a report. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Pairs = tuple[tuple[str, str], ...]  # a label and a text
Files = tuple[tuple[str, Path], ...]  # a label and a file


@dataclass(frozen=True)
class Sample:
    """What a model made of one thing that it had not seen in training.

    Attributes:
        title: of what.
        texts: what went in, what came out, what would have been right, each with its label.
        pictures: JPEG or PNG files.
        sounds: Ogg files.
        pieces: what the model read, in order: kind (mark, text, image, audio or words, which are what
            was heard) and what stands there.
        right: whether the answer is the right one; None where there is no such thing.
    """

    title: str
    texts: Pairs = ()
    pictures: Files = ()
    sounds: Files = ()
    pieces: Pairs = ()
    right: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        media = {key: [[label, str(path)] for label, path in getattr(self, key)] for key in ("pictures", "sounds")}
        return {**asdict(self), **media}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sample:
        """What :meth:`to_dict` made."""
        texts, pieces = (tuple((str(a), str(b)) for a, b in values[key]) for key in ("texts", "pieces"))
        pictures, sounds = (tuple((str(a), Path(b)) for a, b in values[key]) for key in ("pictures", "sounds"))
        return cls(str(values["title"]), texts, pictures, sounds, pieces, values["right"])

    @property
    def files(self) -> list[Path]:
        """All of its files."""
        return [path for _, path in (*self.pictures, *self.sounds)]

    def lines(self, files: bool = True) -> list[str]:
        """As people read it in a terminal."""
        width = max((len(label) for label, _ in self.texts), default=0)
        found = [f"  [{self.title}]"]
        for label, text in self.texts:
            first, *more = text.split("\n")
            found.append(f"    {label:<{width}}  {first}")
            found += [f"    {'':<{width}}  {line}" for line in more]
        if self.pieces:
            found.append("    read: " + " ".join(f"<{kind}: {text}>" if kind in ("image", "audio") else text.strip()
                                                 for kind, text in self.pieces))  # fmt: skip
        return found + ([f"    {label}: {path}" for label, path in (*self.pictures, *self.sounds)] if files else [])


def samples_text(samples: Sequence[Sample], files: bool = True) -> str:
    """Samples one below the other, with or without the places of their files."""
    return "\n\n".join("\n".join(sample.lines(files)) for sample in samples)
