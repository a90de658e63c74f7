"""Files that appear whole or not at all: written beside their place, flushed to the disk, and renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary path to write to; when the block ends well it becomes ``path``, else it is gone.

    A crash at any moment, of the process or of the machine, leaves the old file or the new one. With ``shared`` several
    processes may write the same file at once, each whole; the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex[:12]}" if shared else ""
    partial = path.with_name(f".{path.name}{own}.partial")
    try:
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    except BaseException:  # Ctrl-C too; it goes on its way
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file whole."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process had not finished writing."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError):
            path.unlink()


def _flush_folder(folder: Path) -> None:
    """Make a rename durable; some systems cannot open a folder, and there the rename is durable enough."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
