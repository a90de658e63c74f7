"""This machine's microphone and loudspeaker, through the optional package ``sounddevice``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from omni.config import UserError


class NoSoundDeviceError(UserError):
    """There is no package, no library or no device to record or play with."""


def _device(kind: str) -> Any:
    """The package, once it is known that there is a device of this kind ("input" or "output")."""
    try:
        import sounddevice
    except ImportError:
        raise NoSoundDeviceError(
            "the package sounddevice is not installed; `make setup`, or pip install sounddevice"
        ) from None
    except OSError as error:  # the package is a shell around a library of the system
        raise NoSoundDeviceError(
            f"the library PortAudio is missing ({error}); install it, on Debian libportaudio2"
        ) from None
    try:
        sounddevice.query_devices(kind=kind)
    except (sounddevice.PortAudioError, ValueError) as error:
        what = {"input": "microphone", "output": "loudspeaker"}[kind]
        raise NoSoundDeviceError(f"found no {what} ({' '.join(str(error).split())})") from None
    return sounddevice


class Recorder:
    """Records from the microphone from now on.

    Args:
        sample_rate: samples a second.
        max_seconds: what comes later is left out.

    Raises:
        NoSoundDeviceError: saying what is missing.
    """

    def __init__(self, sample_rate: int, max_seconds: float) -> None:
        package = _device("input")
        self._blocks: list[np.ndarray] = []
        self._left = round(sample_rate * max_seconds)
        try:
            self._stream = package.InputStream(
                samplerate=sample_rate, channels=1, dtype="float32", callback=lambda block, *_: self._keep(block)
            )
            self._stream.start()
        except package.PortAudioError as error:
            raise NoSoundDeviceError(f"the microphone cannot be used ({error})") from None

    def _keep(self, block: np.ndarray) -> None:
        self._blocks.append(block[: self._left, 0].copy())
        self._left -= len(self._blocks[-1])

    def stop(self) -> torch.Tensor:
        """The samples [S] so far; nothing more is recorded."""
        self._stream.stop()
        self._stream.close()
        return torch.from_numpy(np.concatenate(self._blocks)) if self._blocks else torch.zeros(0)


class Player:
    """Plays samples as they come.

    Raises:
        NoSoundDeviceError: saying what is missing.
    """

    def __init__(self, sample_rate: int) -> None:
        package = _device("output")
        try:
            self._stream = package.OutputStream(samplerate=sample_rate, channels=1, dtype="float32")
            self._stream.start()
        except package.PortAudioError as error:
            raise NoSoundDeviceError(f"the loudspeaker cannot be used ({error})") from None

    def play(self, wave_S: torch.Tensor) -> None:
        """Play samples after those before; waits while too many are left to be played."""
        self._stream.write(wave_S.detach().cpu().float().clamp(-1, 1).numpy()[:, None])

    def close(self) -> None:
        """Wait until all is played."""
        self._stream.stop()
        self._stream.close()
