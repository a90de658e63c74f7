"""The figures of ``metrics.jsonl`` shown elsewhere while a run goes on: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from omni.config import RunConfig, UserError


class Board(Protocol):
    """Shows the curves of one phase."""

    def write(self, prefix: str, figures: dict[str, float], step: int) -> None:
        """Add one point to each curve; ``prefix`` is train or val."""

    def close(self) -> None:
        """Hand over what was written."""


class Boards:
    """Several of them as one; none, where nothing is to be shown."""

    def __init__(self, boards: Sequence[Board] = ()) -> None:
        self._boards = boards

    def write(self, prefix: str, figures: dict[str, float], step: int) -> None:
        """Add one point to each curve on each of them."""
        for board in self._boards:
            board.write(prefix, figures, step)

    def close(self) -> None:
        """Close each of them."""
        for board in self._boards:
            board.close()


def open_boards(options: RunConfig, folder: Path, run: str, phase: str, step: int) -> Boards:
    """The boards that a run asks for and can have.

    Args:
        options: the run's keys.
        folder: its ``save_dir``.
        run: its name.
        phase: the phase that begins or continues.
        step: where it stands.

    Raises:
        UserError: when Weights & Biases is asked for and cannot be had; TensorBoard is used where it is installed.
    """
    boards: list[Board] = []
    if options.tensorboard and importlib.util.find_spec("tensorboard"):
        boards.append(TensorBoard(folder / "tensorboard" / phase, step))
    if options.wandb:
        boards.append(WeightsAndBiases(folder, run, phase))
    return Boards(boards)


class TensorBoard:
    """Event files that ``tensorboard --logdir checkpoints`` shows."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def write(self, prefix: str, figures: dict[str, float], step: int) -> None:
        """Add one point to each curve."""
        for name, value in figures.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a phase at Weights & Biases, continued under the same id; runs of one ``save_dir`` are a group.

    Its own environment variables hold: ``WANDB_MODE=offline`` writes to ``save_dir/wandb`` alone, ``WANDB_PROJECT``
    names another project.
    """

    def __init__(self, folder: Path, run: str, phase: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb: found true, but the package is not installed; `pip install wandb`, or leave the key out"
            ) from None
        identity = folder / "wandb" / "id"
        if not identity.exists():  # the folder's own, so that a run that is begun anew elsewhere is another one
            identity.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        group = identity.read_text(encoding="utf-8").strip()
        try:
            self._run: Any = wandb.init(
                dir=str(folder), name=f"{run} {phase}", id=f"{group}-{phase}", group=f"{run} {group}", resume="allow"
            )
        except Exception as error:  # what it raises without a login or a network is its own business
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"wandb: Weights & Biases could not begin ({reason}); `wandb login`, WANDB_MODE=offline, or wandb false"
            ) from error

    def write(self, prefix: str, figures: dict[str, float], step: int) -> None:
        """Add one point to each curve; steps that it already has are not taken a second time."""
        self._run.log({f"{prefix}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
