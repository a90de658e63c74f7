"""What took a while to compute, kept on disk by what it was computed from: encoder features, alignments, codes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from omni import ranks
from omni.atomic import whole_file
from omni.config import Problem
from omni.console import log
from omni.files import content_digest
from omni.parallel import map_small


@dataclass(frozen=True, kw_only=True)
class FeatureCacheConfig:
    """The keys that say where the features of frozen encoders are kept."""

    feature_cache_gb: float = 4.0  # of encoder features on disk, the least recently used go first; 0: none are kept
    feature_cache: str | None = None  # a folder that several runs share; null: `cache` in save_dir

    def problems(self) -> Iterator[Problem]:
        """A size that is none."""
        if not 0 <= self.feature_cache_gb < float("inf"):
            yield Problem("feature_cache_gb", str(self.feature_cache_gb), "a number of gigabytes, or 0 to keep none")
        if self.feature_cache is not None and Path(self.feature_cache).is_file():
            yield Problem("feature_cache", f"a file ({self.feature_cache})", "a folder, or null")


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
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return _read(file)
    found = compute()
    if files and ranks.rank() == 0:
        _keep(files[0], found)
    return found


def _read(file: Path) -> list[torch.Tensor]:
    """The tensors of a file; their checksums are compared."""
    with np.load(file) as kept:
        return [torch.from_numpy(kept[f"arr_{number}"]) for number in range(len(kept.files))]


def _keep(file: Path, tensors: Sequence[torch.Tensor], shared: bool = False) -> None:
    try:
        with whole_file(file, shared) as partial, partial.open("wb") as handle:
            np.savez(handle, *(item.numpy() for item in tensors))
    except OSError as error:  # nothing is lost: it is computed again the next time
        log.warning("%s: cannot be kept (%s)", file, error.strerror)


_STALE_SECONDS = 3600.0  # a file half-written this long ago is a killed process's


class FeatureCache:
    """Features of files, in shards of a batch each, keyed by contents, in a folder that several runs may share.

    A shard is what was encoded together, and its key is the contents of all of its files in their order: a feature
    depends in its last bits on the batch that it was computed in, so a feature taken from another batch would make a
    run with a cache differ from one without.

    Args:
        folder: where the shards are; None keeps nothing.
        limit_gb: most gigabytes (10^9 bytes) of all shards in it; 0 keeps nothing.
    """

    PREFIX = "features-"

    def __init__(self, folder: Path | None = None, limit_gb: float = FeatureCacheConfig.feature_cache_gb) -> None:
        self.folder = folder if limit_gb > 0 else None
        self.limit = int(limit_gb * 1e9)
        self._own: set[Path] = set()  # read or written by this process: not to be removed by it
        self._digests: dict[str, tuple[int, int, bytes]] = {}
        self._full = False
        if self.folder is not None:
            self._remove_stale()

    @classmethod
    def of(cls, config: FeatureCacheConfig, folder: Path) -> FeatureCache:
        """The cache of a configuration; ``folder`` is where it is by default."""
        return cls(Path(config.feature_cache) if config.feature_cache else folder, config.feature_cache_gb)

    def get(
        self, kind: str, made_by: str, paths: Sequence[str], compute: Callable[[], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """What ``compute`` returns, from the disk if it is there.

        Args:
            kind: a part of the file's name.
            made_by: a key of what computes it and how.
            paths: the files it is computed from; their bytes count, and not their names.
            compute: called where there is no such shard, or a damaged one.
        """
        if self.folder is None:
            return compute()
        digest = hashlib.sha256(made_by.encode())
        for content in map_small(self._content, paths):
            digest.update(content)
        file = self.folder / f"{self.PREFIX}{kind}-{digest.hexdigest()[:32]}.npz"
        try:
            found = _read(file)
        except FileNotFoundError:
            found = None
        except Exception as error:  # the zip reader raises nearly anything on a damaged file
            why = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("%s: damaged (%s); what it held is computed again", file, why[:120])
            found = None
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(file)  # the least recently used go first
            self._own.add(file)
            return found
        found = compute()
        if self._has_room(sum(item.nbytes + 512 for item in found)):
            _keep(file, found, shared=True)
            self._own.add(file)
        return found

    def _content(self, path: str) -> bytes:
        """A hash of a file's bytes; one that cannot be read has none, and whoever decodes it says why."""
        try:
            status = Path(path).stat()
            size, changed, digest = self._digests.get(path, (-1, -1, b""))
            if (size, changed) != (status.st_size, status.st_mtime_ns):
                digest = content_digest(Path(path))
                self._digests[path] = status.st_size, status.st_mtime_ns, digest
            return digest
        except OSError:
            return b"unreadable"

    def _has_room(self, size: int) -> bool:
        """Remove the least recently used shards until ``size`` more bytes fit; those of this run stay."""
        assert self.folder is not None
        shards = []
        for path in self.folder.glob(f"{self.PREFIX}*.npz"):
            with contextlib.suppress(OSError):  # another run may remove it at this moment
                status = path.stat()
                shards.append((status.st_mtime_ns, status.st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in shards)
        for _, bytes_, path in sorted(shards):
            if total <= self.limit:
                break
            if path not in self._own:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= bytes_
        if total > self.limit and not self._full:
            self._full = True
            log.warning(
                "%s: full (feature_cache_gb = %g); the next run will encode again what does not fit",
                self.folder, self.limit / 1e9,
            )  # fmt: skip
        return total <= self.limit

    def _remove_stale(self) -> None:
        """Remove what killed processes had not finished writing, where no run cleans up its own folder."""
        assert self.folder is not None
        for path in self.folder.glob(f".{self.PREFIX}*.partial"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
