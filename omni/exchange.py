"""One question and its answer, for the end of a run and for the report. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Exchange:
    """What was asked of the omni model and what it said.

    Attributes:
        kind: text, image or speech: how it was asked.
        question: the words, also where they were spoken.
        answer: what the model answered.
        expected: the right answer.
        image: the picture that was shown.
        audio: the recording in which it was asked.
        answer_wav: the spoken answer.
    """

    kind: str
    question: str
    answer: str
    expected: str
    image: Path | None = None
    audio: Path | None = None
    answer_wav: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Exchange:
        """What :meth:`to_dict` made."""
        paths = {key: Path(values[key]) if values[key] else None for key in ("image", "audio", "answer_wav")}
        return cls(values["kind"], values["question"], values["answer"], values["expected"], **paths)

    def lines(self) -> list[str]:
        """As people read it in a terminal."""
        media = [f"picture {self.image}"] * bool(self.image) + [f"recording {self.audio}"] * bool(self.audio)
        found = [f"  [{self.kind}] {self.question}" + (f"   ({', '.join(media)})" if media else "")]
        found.append(f"    answer: {self.answer}   (expected: {self.expected})")
        return found + ([f"    spoken: {self.answer_wav}"] if self.answer_wav else [])
