"""Recordings that were cut off: what a container says of its own length, beside how long the file is.

libsndfile reads a recording that a broken download or a full disk left half as if it were shorter, without a word.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_UNKNOWN = 0x7FFFF000  # sizes from here on, and 0, are written by programs that cannot go back to fill them in
_OGG_PAGE = 65_307  # bytes, the longest there is
_OGG_LAST = 0x04  # flag of the page that ends a stream
_MP3_FRAME = 1152  # samples


def cut_off(source: Path | BinaryIO) -> str:
    """What is missing at a recording's end, from its headers alone; "" where nothing is, or where they do not say."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return cut_off(file)
    source.seek(0)
    head = source.read(40)
    size = source.seek(0, 2)
    if head.startswith(b"OggS"):
        return "" if _ends_with_last_page(source, size) else "its last page is missing"
    end = _declared_end(source, head)
    return f"it should have {end} bytes and has {size}" if end is not None and end > size else ""


def too_few_samples(num_read: int, num_declared: int, container: str) -> bool:
    """Whether decoding ended early; MP3 headers may count a frame in part."""
    return num_read < num_declared - (_MP3_FRAME if container == "MP3" else 0)


def _declared_end(file: BinaryIO, head: bytes) -> int | None:
    """Where the samples end by the header's word; None where it does not say."""
    if head.startswith((b"RIFF", b"RF64")) and head[8:12] == b"WAVE":
        return _wav_end(file, head)
    if head.startswith(b"FORM"):  # AIFF
        return struct.unpack(">I", head[4:8])[0] + 8
    if head.startswith(b"riff"):  # Sony Wave64
        return struct.unpack("<Q", head[16:24])[0]
    return None


def _wav_end(file: BinaryIO, head: bytes) -> int | None:
    at = 12
    while True:
        file.seek(at)
        chunk = file.read(8)
        if len(chunk) < 8:
            return None
        size = struct.unpack("<I", chunk[4:])[0]
        if chunk[:4] == b"data":
            if head.startswith(b"RF64"):  # the true size stands in the first chunk
                return at + 8 + struct.unpack("<Q", head[28:36])[0]
            return None if size == 0 or size >= _UNKNOWN else at + 8 + size
        at += 8 + size + size % 2


def _ends_with_last_page(file: BinaryIO, size: int) -> bool:
    file.seek(max(0, size - 2 * _OGG_PAGE))
    end = file.read()
    at = end.rfind(b"OggS")
    page = end[at:]
    if at < 0 or len(page) < 27 or len(page) < 27 + page[26]:
        return False
    return bool(page[5] & _OGG_LAST) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
