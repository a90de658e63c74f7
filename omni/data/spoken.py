"""A person's own text, spoken by the voices of the micro-world: recordings for whoever has too few of them.

A few minutes of one voice teach stage B a voice, not a language: it knows the sentences by heart afterwards. What it
lacks is words, and text has them; that synthesized speech teaches a recognizer words that no recording had is an old
observation (Rosenberg et al., 2019, "Speech recognition with augmented synthesized speech").
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from omni.atomic import write_whole
from omni.config import UserError
from omni.data.espeak import TRAIN_VOICES, require, speak_all
from omni.data.manifest import read_text_file
from omni.data.recordings import Recorder, as_csv, turns_of
from omni.speech_text import SpokenWord, spoken_words

MANIFEST = "spoken.csv"
_FEWEST, _MOST = 3, 14  # words of a sentence; 14 take about five seconds
_ENDS = re.compile(r"(?<=[.!?;:])\s+|\n")


def sentences(text: str) -> Iterator[str]:
    """Sentences as they are spoken, "the trumpet sounds", of 3 to 14 words, each once; longer ones are cut.

    A cut falls behind the last punctuation mark that leaves both parts long enough, else behind the fourteenth word.
    """
    said: set[str] = set()
    for piece in _ENDS.split(text):
        words = spoken_words(piece)
        while len(words) >= _FEWEST:
            end = _cut(words)
            sentence = " ".join(word.letters for word in words[:end])
            if sentence not in said:
                said.add(sentence)
                yield sentence
            words = words[end:]


def _cut(words: Sequence[SpokenWord]) -> int:
    """How many of the words are said at once."""
    if len(words) <= _MOST:
        return len(words)
    marks = (end for end in range(_MOST, _FEWEST - 1, -1) if words[end - 1].pause != " ")
    return next(marks, _MOST)


def speak_texts(
    paths: Sequence[Path], out: Path, most: int, seed: int = 0, pace: float = 1.0, processes: int | None = None
) -> Path:
    """Write recordings of the sentences of some text files, and their manifest, ``out/spoken.csv``.

    Args:
        paths: UTF-8 text files.
        out: a folder; recordings are written to ``wavs/`` in it. Those of an earlier call are replaced.
        most: how many sentences at most, drawn at random; each is said once, the voices of training taking turns.
        seed: of the choice, the voices and the sound: the same seed and text give the same bytes.
        pace: how fast, beside the 13 characters a second of the micro-world; people who read aloud say 14 to 18.
        processes: that speak; default: one a core.

    Returns:
        The manifest (wav,text,speaker).

    Raises:
        UserError: for a file that cannot be read, texts without a sentence to speak, or when there is no espeak-ng.
    """
    found = list(dict.fromkeys(sentence for path in paths for sentence in sentences(read_text_file(path))))
    if not found:
        raise UserError(
            f"{paths[0]}: found no sentence of {_FEWEST} words or more in Latin letters, expected text to speak"
        )
    require()
    rng = random.Random(seed)
    chosen = rng.sample(found, min(most, len(found)))
    (out / "wavs").mkdir(parents=True, exist_ok=True)
    manifest = out / MANIFEST
    manifest.unlink(missing_ok=True)  # it stands where the folder is whole
    recorder = Recorder(out, seed, pace)
    voices = turns_of(TRAIN_VOICES, rng)
    rows = [recorder.record("spoken", sentence, next(voices)) for sentence in chosen]
    with speak_all(recorder.jobs, processes) as speaking:
        speaking.wait()
    ours = {Path(job.path).name for job in recorder.jobs}
    for path in (out / "wavs").glob("spoken_*.wav*"):
        if path.name not in ours:
            path.unlink()
    write_whole(manifest, as_csv(rows).encode())
    return manifest
