"""Checkpoints that appear whole or not at all, say what they are without torch, and prove that they are undamaged.

A checkpoint is an ordinary ``torch.save`` file (a zip archive) with one more member, ``omni.json``: a summary that any
program can read in a millisecond (stage, phase, step, configuration, figures, lineage) and a SHA-256 over all other
members. Saving goes to a temporary file that is flushed to the disk and then renamed, so a crash at any moment leaves
either the old file or the new one. Loading runs no code from the file (``weights_only=True``).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from omni.atomic import whole_file
from omni.config import UserError
from omni.console import log
from omni.lineage import differences
from omni.summary import FORMAT, MEMBER, DamagedCheckpointError, is_summary, read_summary, unreadable
from omni.summary import fingerprint as fingerprint
from omni.training_types import Run


def save_checkpoint(path: Path, tensors: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write ``tensors`` (nested dicts and lists of tensors and plain values) and ``summary`` (JSON) to ``path``.

    Raises:
        UserError: when the disk is full or the folder cannot be written; whatever stood at ``path`` is untouched.
    """
    try:
        _refuse_full_disk(path, _num_bytes(tensors))
        with whole_file(path) as partial:
            torch.save(tensors, partial)
            head = {"format": FORMAT, "sha256": _digest(partial), **summary}
            with zipfile.ZipFile(partial, "a") as archive:
                # beside the other members: torch.load refuses an archive with a member outside of its one folder
                folder = archive.namelist()[0].partition("/")[0]
                archive.writestr(f"{folder}/{MEMBER}", json.dumps(head))
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # torch reports a failed write as RuntimeError
        free = f"; {_free_bytes(path.parent) / 2**20:.0f} MiB are free there" if path.parent.exists() else ""
        raise UserError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]}){free}") from error


def _refuse_full_disk(path: Path, size: int) -> None:
    """Raise OSError when a checkpoint of ``size`` bytes would not fit beside the file that it replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = size + 2**20  # and what the archive says about each tensor
    if _free_bytes(path.parent) < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 2**20:.0f} MiB are needed")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Verify a checkpoint and return ``(tensors, summary)``.

    Raises:
        DamagedCheckpointError: when a byte of it is not what was written.
    """
    summary = read_summary(path)
    try:
        if _digest(path) != summary["sha256"]:
            raise DamagedCheckpointError(f"{path}: damaged (its contents do not match its checksum)")
        return torch.load(path, map_location=device, weights_only=True), summary
    except DamagedCheckpointError:
        raise
    except Exception as error:  # the unpickler and zip reader raise nearly anything on a damaged file
        raise unreadable(path, "damaged", error) from None


def load_input(path: str | Path, kind: str, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the checkpoint of an earlier stage that a stage is built on.

    Args:
        path: the final checkpoint of that stage.
        kind: what it must be, for example ``thinker``.
        command: the command that makes it, for the message.

    Raises:
        UserError: naming the file and the command to run first.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint, expected a finished {kind}; run `{command}` first")
    tensors, summary = load_checkpoint(path)
    if summary["kind"] != kind:
        raise UserError(f"{path}: found a checkpoint of {summary['kind']}, expected one of {kind}; run `{command}`")
    return tensors, summary


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    """Load weights strictly.

    Raises:
        UserError: listing missing, unexpected and differently shaped weights.
    """
    own = module.state_dict()
    lines = [f"  missing: {key}" for key in own if key not in weights]
    lines += [f"  unexpected: {key}" for key in weights if key not in own]
    lines += [
        f"  {key}: found shape {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if lines:
        shown = lines[:12] + ([f"  ... and {len(lines) - 12} more"] if len(lines) > 12 else [])
        raise UserError(f"{where}: the weights do not fit this model:\n" + "\n".join(shown))
    module.load_state_dict(weights)


def as_tensor(data: bytes) -> torch.Tensor:
    """A file's bytes as a tensor, the form in which a checkpoint can carry it."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def as_bytes(data: torch.Tensor) -> bytes:
    """The bytes that :func:`as_tensor` stored."""
    return data.cpu().numpy().tobytes()


def periodic_checkpoints(save_dir: Path, name: str) -> list[tuple[int, Path]]:
    """``(step, path)`` of ``<name>_step_<N>.pt`` files, newest first. Steps count over all phases."""
    pattern = re.compile(re.escape(name) + r"_step_(\d+)\.pt")
    found = [(int(m[1]), path) for path in save_dir.glob(f"{name}_step_*.pt") if (m := pattern.fullmatch(path.name))]
    return sorted(found, reverse=True)


def prune(save_dir: Path, name: str, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` periodic checkpoints; best and final ones are never touched."""
    for _, path in periodic_checkpoints(save_dir, name)[keep_last:]:
        path.unlink()


def resume_candidates(save_dir: Path, name: str) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any] | None, str]]:
    """Yield ``(path, summary, tensors, problem)`` from the newest on, up to the first that loads.

    A damaged one is yielded with ``tensors`` None and what is wrong with it, so that the caller can name it.
    """
    paths = [(step, path) for step, path in periodic_checkpoints(save_dir, name)]
    final = save_dir / f"{name}.pt"
    if final.exists():
        try:
            paths.append((read_summary(final)["total_step"], final))
        except DamagedCheckpointError as error:
            yield final, {}, None, str(error)
    for _, path in sorted(paths, key=lambda item: (-item[0], item[1] != final)):
        try:
            tensors, summary = load_checkpoint(path)
        except DamagedCheckpointError as error:
            yield path, {}, None, str(error)
            continue
        yield path, summary, tensors, ""
        return


def refuse_another_run(path: Path, summary: dict[str, Any], run: Run, seed: int) -> None:
    """A resume with another model, data, inputs or seed would be a new run under an old name.

    Raises:
        UserError: naming every difference between the checkpoint's and the present ones.
    """
    theirs, ours = dict(summary["lineage"]), dict(run.lineage)
    if run.data_may_change:
        changed = list(differences(theirs.pop("data", None), ours.pop("data", None), "data"))
        if changed:
            log.warning("%s: the data have changed, and their order with them: %s", path, "; ".join(changed))
    old = {"model": summary["model_config"], "lineage": theirs, "seed": summary["config"]["run"]["seed"]}
    lines = list(differences(old, {"model": run.model_config, "lineage": ours, "seed": seed}))
    if lines:
        raise UserError(
            f"{path}: belongs to another run; differences (there -> now):\n  "
            + "\n  ".join(lines)
            + "\nUse --fresh to set the old run aside and start over, or another --save_dir. "
            "Where files have turned bad, --on_bad_sample skip goes on without them."
        )


def claim_folder(save_dir: Path) -> IO[str]:
    """Lock ``save_dir`` for this process.

    The lock is the operating system's, so it ends with the process however that ends. Keep the returned file open.

    Raises:
        UserError: when another run holds the folder, or it cannot be written.
    """
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        handle = (save_dir / ".lock").open("a+")
    except OSError as error:
        raise UserError(
            f"{save_dir}: cannot be written ({error.strerror}), expected a folder for checkpoints"
        ) from None
    try:
        # a record lock belongs to this process alone: those that it forks to prepare batches may outlive it
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{save_dir / '.lock'}: cannot be locked ({error.strerror}); choose another disk") from None
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        raise UserError(
            f"{save_dir}: another run is writing here ({holder}); wait for it or choose another --save_dir"
        ) from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {platform.node()}\n")
    handle.flush()
    return handle


def set_aside(save_dir: Path) -> None:
    """Move an earlier run to a folder of its own; what was only kept to save time (``cache``) stays."""
    earlier = [path for path in save_dir.iterdir() if path.name not in (".lock", "cache")]
    if earlier:
        aside = save_dir.with_name(f"{save_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        log.info("set the earlier run aside in %s", aside)


def _digest(path: Path) -> str:
    """SHA-256 over names and contents of every member but the summary."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if is_summary(member.filename):
                continue
            digest.update(member.filename.encode())
            with archive.open(member) as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()
