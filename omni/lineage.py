"""What a run was made from, and what differs between what two were made from. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from omni.config import short_json

_ROOT = Path(__file__).parent.parent  # of the checkout; of site-packages, where the package was installed


@functools.cache
def code_version() -> dict[str, str | None]:
    """The code that runs: version of the package, commit if it is a checkout, and a hash of its source files."""
    version = commit = None
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("micro-omni")
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"]
        if (_ROOT / ".git").exists():
            commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    digest = hashlib.sha256()
    scripts = [path for path in _ROOT.glob("*.py") if (_ROOT / "pyproject.toml").exists()]
    for path in sorted([*scripts, *(_ROOT / "omni").rglob("*.py")]):
        digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return {"version": version, "commit": commit, "source": digest.hexdigest()[:16]}


def data_fingerprint(manifest: str | Path, media: Iterable[str | Path] = ()) -> dict[str, Any]:
    """What tells two data sets apart, wherever they stand and whatever their files are called.

    The contents of media are not read: that would take minutes at every start.

    Args:
        manifest: a manifest, a text file, or a folder of text files: their contents count.
        media: the recordings and pictures that it names: their sizes count.
    """
    manifest, digest = Path(manifest), hashlib.sha256()
    for file in sorted(manifest.glob("*.txt")) if manifest.is_dir() else [manifest]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    sizes = [Path(path).stat().st_size for path in media]
    digest.update(json.dumps(sizes).encode())
    return {"media": len(sizes), "media_bytes": sum(sizes), "sha256": digest.hexdigest()[:16]}


def differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """What differs between two nested plain values, one ``key: old -> new`` a line."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield f"{key}: {short_json(old)} -> {short_json(new)}"
