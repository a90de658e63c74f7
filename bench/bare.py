"""Runs where only the packages of a usual CUDA image are there: stand-ins for those that a benchmark hardly needs.

Some modules of the project import at their top what only an evaluation or real files need. Where such a package is
missing, an empty module takes its place, which says so when something of it is used; soundfile's reading and writing
of plain WAV files, which the noise that stages are timed on is made of, is done by scipy.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

OPTIONAL = ("jiwer", "num2words", "plotille")


class _Missing(types.ModuleType):
    """A package that is not installed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **named: Any) -> Any:
            raise ModuleNotFoundError(f"{self.__name__} is not installed, and {self.__name__}.{name} was called")

        return absent


def fill_in() -> list[str]:
    """Put stand-ins where packages are missing; returns their names."""
    missing = [name for name in (*OPTIONAL, "soundfile") if importlib.util.find_spec(name) is None]
    for name in missing:
        sys.modules[name] = _wav_files() if name == "soundfile" else _Missing(name)
    return missing


def _wav_files() -> types.ModuleType:
    """The little of soundfile that mono 16-bit WAV files need."""
    from scipy.io import wavfile

    class SoundFile:
        """A WAV file, read at once."""

        format = "WAV"

        def __init__(self, name: str) -> None:
            self.samplerate, samples = wavfile.read(name)
            self._samples = samples.astype(np.float32)[:, None] / 32768
            self.frames = len(samples)

        def read(self, count: int = -1, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
            return self._samples if count < 0 else self._samples[:count]

        def close(self) -> None:
            """Nothing is open."""

        def __enter__(self) -> SoundFile:
            return self

        def __exit__(self, *args: object) -> None:
            self.close()

    def write(path: str | Path, samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> None:
        wavfile.write(str(path), rate, (np.asarray(samples) * 32767).astype(np.int16))

    module = types.ModuleType("soundfile")
    vars(module).update(SoundFile=SoundFile, write=write)
    return module
