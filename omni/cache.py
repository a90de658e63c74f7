"""What took a while to compute, kept on disk by what it was computed from: encoder features, alignments, codes."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from omni import ranks
from omni.atomic import whole_file
from omni.console import log


def cache_key(modules: Iterable[nn.Module], paths: Iterable[str | Path], texts: Iterable[str] = ()) -> str:
    """A key of everything that a result depends on.

    Args:
        modules: what computes it: their weights count, and whether autocast is on where they are.
        paths: the files it is computed from: path, size and time of change count.
        texts: whatever else it depends on.
    """
    digest = hashlib.sha256()
    for module in modules:
        for weight in module.state_dict().values():
            digest.update(weight.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(str(torch.is_autocast_enabled(next(module.parameters()).device.type)).encode())
    for path in paths:
        status = Path(path).stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    for text in texts:
        digest.update(f"\n{text}".encode())
    return digest.hexdigest()[:16]


def through_cache(
    folders: Sequence[Path], name: str, key: str, compute: Callable[[], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Tensors from the first folder that has them; else they are computed and kept in the first folder, if any.

    A file that cannot be read is as good as none: what it held is computed again. Of several ranks the first computes.
    """
    files = [folder / f"{name}-{key}.npz" for folder in folders]
    with ranks.first() if files else contextlib.nullcontext():
        return _through(files, compute)


def _through(files: list[Path], compute: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    for file in files:
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(file) as kept:
            return [torch.from_numpy(kept[f"arr_{number}"]) for number in range(len(kept.files))]
    found = compute()
    if files and ranks.rank() == 0:
        try:
            with whole_file(files[0]) as partial, partial.open("wb") as handle:
                np.savez(handle, *(item.numpy() for item in found))
        except OSError as error:  # nothing is lost: it is computed again the next time
            log.warning("%s: cannot be kept (%s)", files[0], error.strerror)
    return found
