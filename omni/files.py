"""What a file really is, whatever its name says: whether it can be read at all, and what its first bytes are.

Nothing here decodes a file, and what is no file (a named pipe, a device) is never opened: that could wait for ever.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

_HEAD = 512  # bytes that say what a file is
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# (where, first bytes, what that is); the first that fits is taken
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, LFS_POINTER, "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (8, b"WAVE", "a WAV recording"),
    (8, b"WEBP", "a WebP picture"),
    (8, b"AIF", "an AIFF recording"),
    (4, b"ftyp", "an MP4, M4A or HEIC file; convert it"),
    (0, b"fLaC", "a FLAC recording"),
    (0, b"OggS", "an Ogg recording"),
    (0, b"ID3", "an MP3 recording"),
    (0, b"\xff\xfb", "an MP3 recording"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"PK\x03\x04", "a zip archive or an office document; unpack or export it"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (0, b"PAR1", "a Parquet table"),
)
_HTML = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)


def file_problem(path: Path) -> str:
    """What is wrong with a file before it is opened, such as "no such file" or "found a folder"; "" if nothing is."""
    try:
        found = path.stat()
    except ValueError:
        return "found a name that no file can have:"
    except OSError as error:
        return _STAT_PROBLEMS.get(error.errno or 0, "no such file")
    if not stat.S_ISREG(found.st_mode):
        kinds = (kind for is_kind, kind in _KINDS if is_kind(found.st_mode))
        return f"found {next(kinds, 'a special file')}"
    if found.st_size == 0:
        return "found an empty file"
    return "" if os.access(path, os.R_OK) else "no permission to read"


_STAT_PROBLEMS = {
    errno.ELOOP: "found a loop of symbolic links",
    errno.ENAMETOOLONG: "found a name that is too long:",
    errno.EACCES: "no permission to read",
}
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder once ``..`` and symbolic links are resolved on both sides."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def content_digest(path: Path) -> bytes:
    """A hash of a file's bytes, equal where these are. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def describe_content(source: Path | BinaryIO) -> str:
    """What the first bytes of a file are, in words, for the message that says why a decoder refused it."""
    if isinstance(source, Path):
        if problem := file_problem(source):
            return problem.removeprefix("found ").rstrip(":")
        try:
            with source.open("rb") as file:
                head = file.read(_HEAD)
        except OSError as error:
            return f"a file that cannot be read ({error.strerror})"
    else:
        source.seek(0)
        head = source.read(_HEAD)
        if not head:
            return "an empty file"
    for start, magic, kind in _MAGIC:
        if head.startswith(magic, start):
            return kind
    if _HTML.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "an HTML page; the download failed"
    text = head.decode("utf-8", errors="replace")
    if "\0" not in text and text.count("\ufffd") <= 1:  # one may be a character that the cut went through
        return f"text that begins with {' '.join(text.split())[:30]!r}"
    return "bytes of no kind known here"


def shown(name: str) -> str:
    """A name as it can stand in a message of one line."""
    plain = name if name.isprintable() else ascii(name)
    return plain if len(plain) <= 160 else f"{plain[:80]}...{plain[-40:]}"
