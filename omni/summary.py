"""What a checkpoint says of itself, read in a millisecond and without torch.

Every checkpoint holds a JSON member, ``omni.json``: stage, phase, step, configuration, figures, lineage, and a SHA-256
over all other members. ``omni run`` and everything that only looks at checkpoints reads that and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

from omni.config import UserError

FORMAT = 1
MEMBER = "omni.json"
_LARGEST_SUMMARY = 16 << 20  # bytes; ours have kilobytes, a hostile one could unpack to more than the memory
_LARGEST_DIRECTORY = 8 << 20  # bytes; about a hundred a tensor


class DamagedCheckpointError(UserError):
    """A file that is not a whole checkpoint of this project."""


_NOT_ITS_FAULT = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT)


def unreadable(path: str | Path, what: str, error: Exception) -> UserError:
    """The error of a file that cannot be read: damage, unless the disk, the rights or the memory are to blame."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in text)
    if memory or (isinstance(error, OSError) and error.errno in _NOT_ITS_FAULT):
        return UserError(f"{path}: cannot be read now ({text}), which need not be the file's fault; try again")
    return DamagedCheckpointError(f"{path}: {what} ({text})")


def is_summary(member: str) -> bool:
    """Whether a member of the archive is the summary, in whatever folder it stands."""
    return member.rpartition("/")[2] == MEMBER


def read_summary(path: str | Path) -> dict[str, Any]:
    """The JSON summary of a checkpoint, without reading its tensors.

    Raises:
        DamagedCheckpointError: when the file is not a whole checkpoint of this project.
        UserError: when there is no such file.
    """
    try:
        _refuse_crowd(path)
        with zipfile.ZipFile(path) as archive:
            member = next(item for item in archive.infolist() if is_summary(item.filename))
            if member.file_size > _LARGEST_SUMMARY:
                raise ValueError(f"its {MEMBER} would have {member.file_size:,} bytes")
            summary = json.loads(archive.read(member))
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except StopIteration:
        raise DamagedCheckpointError(f"{path}: not a μOmni checkpoint (it has no {MEMBER})") from None
    except Exception as error:  # the zip reader and its decompressors raise nearly anything on a damaged file
        raise unreadable(path, "not a whole μOmni checkpoint", error) from None
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path}: not a μOmni checkpoint of format {FORMAT}")
    return summary


def _refuse_crowd(path: str | Path) -> None:
    """Raise ValueError when a zip archive says that its directory, which is read as a whole, is larger than ours."""
    with Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 22 - 0xFFFF - 20))
        tail = file.read()
        place = tail.rfind(b"PK\5\6")
        if place < 0:
            return  # not an archive: the reader says so
        (size,) = struct.unpack_from("<I", tail, place + 12)
        if size == 0xFFFFFFFF and tail[place - 20 : place - 16] == b"PK\6\7":  # the size is in the larger record
            file.seek(struct.unpack_from("<Q", tail, place - 12)[0] + 40)
            (size,) = struct.unpack("<Q", file.read(8))
    if size > _LARGEST_DIRECTORY:
        raise ValueError(f"its directory would have {size:,} bytes")


def fingerprint(path: str | Path) -> str:
    """The checksum of a checkpoint's contents, as recorded in it: the link of a lineage."""
    return str(read_summary(path)["sha256"])
