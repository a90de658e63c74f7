"""Speech as bytes: whole files in the formats that the API knows, and raw samples while they are made."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import soundfile
import torch

from omni.audio import resample
from omni.streaming import WindowedStream

RAW_RATE = 24_000  # samples a second of the API's raw formats
_CONTEXT = 8  # blocks of the resampling filter, which reaches 6.1 samples of the lower rate to either side

# (media type, container, coding)
_FILES = {
    "wav": ("audio/wav", "WAV", "PCM_16"),
    "mp3": ("audio/mpeg", "MP3", "MPEG_LAYER_III"),
    "flac": ("audio/flac", "FLAC", "PCM_16"),
    "opus": ("audio/ogg", "OGG", "OPUS"),
}


def media_type(kind: str) -> str:
    """What a format is called in a response's header."""
    return _FILES[kind][0] if kind in _FILES else "audio/pcm"


def sound_file(waves: Sequence[torch.Tensor], rate: int, kind: str) -> bytes:
    """All pieces of a speech as one file; "pcm" and "pcm16" are raw 16-bit samples at 24 kHz."""
    if kind not in _FILES:
        raw = RawStream(rate)
        return b"".join(raw.push(wave_S) for wave_S in waves) + raw.end()
    _, container, coding = _FILES[kind]
    samples = torch.cat(list(waves)).detach().float().clamp(-1, 1).cpu().numpy()
    writer = io.BytesIO()
    soundfile.write(writer, samples, rate, format=container, subtype=coding)
    return writer.getvalue()


class RawStream:
    """Samples at any rate to raw 16-bit ones at 24 kHz, piece by piece; the pieces are those of the whole."""

    def __init__(self, rate: int) -> None:
        shared = math.gcd(rate, RAW_RATE)
        self._block, self._new_block = rate // shared, RAW_RATE // shared  # 2 samples become 3
        self._rate, self._waiting = rate, torch.zeros(0)
        self._stream = WindowedStream(self._resample, _CONTEXT, 1)

    def push(self, wave_S: torch.Tensor, last: bool = False) -> bytes:
        """The samples that are certain by now."""
        wave_S = torch.cat([self._waiting, wave_S.detach().float().cpu()])
        if last:
            wave_S = torch.nn.functional.pad(wave_S, (0, -len(wave_S) % self._block))
        size = len(wave_S) // self._block * self._block
        self._waiting = wave_S[size:]
        blocks_TS = wave_S[:size].view(-1, self._block)
        if not last and not len(blocks_TS):
            return b""
        made_S = self._stream.push(blocks_TS, last).flatten() if self._rate != RAW_RATE else wave_S[:size]
        return (made_S.clamp(-1, 1) * 32767).round().numpy().astype(np.dtype("<i2")).tobytes()

    def end(self) -> bytes:
        """The last samples."""
        return self.push(torch.zeros(self._block), last=True)

    def _resample(self, blocks_1TS: torch.Tensor) -> torch.Tensor:
        wave_1S = resample(blocks_1TS.flatten(1), self._rate, RAW_RATE)
        return wave_1S[:, : blocks_1TS.shape[1] * self._new_block].view(1, -1, self._new_block)
