"""What is to be recorded, and the rows of the speech manifests."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from omni.data.espeak import Job
from omni.data.world import key


@dataclass(frozen=True)
class Recording:
    """One row of a speech manifest; the path is relative to the folder of the manifests."""

    wav: str
    text: str
    speaker: str


def as_csv(rows: Sequence[Recording]) -> str:
    """A manifest of recordings, as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("wav", "text", "speaker"))
    writer.writerows((row.wav, row.text, row.speaker) for row in rows)
    return buffer.getvalue()


@dataclass
class Recorder:
    """Collects utterances; each gets a file name at once, and its sound when all are known."""

    folder: Path
    seed: int
    pace: float = 1.0  # of all utterances, beside the voices' own 13 characters a second
    jobs: list[Job] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)
    _said: Counter[tuple[str, str]] = field(default_factory=Counter)

    def record(self, group: str, text: str, voice: str, vary: bool = True) -> Recording:
        """Plan a recording `wavs/<group>_<number>.wav`; `vary`: up to 8 % slower or faster.

        Nobody says the same twice alike: of a text that a voice has said before, in training perhaps, the recording
        is another one.
        """
        number = self._counts.get(group, 0)
        self._counts[group] = number + 1
        wav = f"wavs/{group}_{number:05d}.wav"
        before = self._said[voice, text]
        self._said[voice, text] += 1
        again = (before,) if before else ()
        scale = 1 + 0.16 * (key(self.seed, "rate", voice, text, *again) - 0.5) if vary or before else 1.0
        noise_seed = int(key(self.seed, "noise", voice, text, *again) * 2**31)
        self.jobs.append(Job(text, voice, str((self.folder / wav).absolute()), self.pace * scale, noise_seed))
        return Recording(wav, text, voice)


def turns_of(voices: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yield voices for ever, each equally often, in an order without a pattern."""
    rounds = (rng.sample(list(voices), len(voices)) for _ in cycle((0,)))
    return (voice for order in rounds for voice in order)
