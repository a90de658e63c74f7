"""What a stage script hands to the training loop: a :class:`Run` with its phases, each a :class:`Stage`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from omni.config import PhaseConfig


class BatchLike(Protocol):
    """What the loop needs of a batch."""

    counts: dict[str, int]  # targets of each loss term, on all ranks together

    def to(self, device: torch.device) -> Any:
        """The batch on ``device``."""


class StreamLike(Protocol):
    """What the loop needs of a stream of batches."""

    rows: list[int]  # of the batch last returned, those of all ranks
    epoch: int

    def __next__(self) -> BatchLike: ...

    @property
    def num_bad(self) -> int:
        """Samples that could not be used."""

    def where(self, index: int) -> str:
        """Where a row stands in the user's files."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches used so far."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""

    def close(self) -> None:
        """Let go of processes and files."""


@dataclass
class RunState:
    """The small state of a run that a checkpoint must hold."""

    phase: int = 0
    step: int = 0  # of this phase, skipped batches included
    total_step: int = 0  # over all phases
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    stale: int = 0  # validations since the best
    stopped_early: bool = False
    seen: dict[str, int] = field(default_factory=dict)  # targets seen, by phase and unit
    seconds: float = 0.0
    window_loss: float = 0.0  # sums since the last line in the log
    window_steps: int = 0
    window_seen: int = 0
    window_seconds: float = 0.0
    figures: dict[str, dict[str, float]] = field(default_factory=dict)  # last validation of each phase

    def next_phase(self) -> None:
        """Go on to the next phase; what counts over all phases stays."""
        self.phase += 1
        self.step = self.stale = self.window_steps = self.window_seen = 0
        self.best, self.stopped_early = None, False
        self.window_loss = self.window_seconds = 0.0


LossFunction = Callable[[Any, Any], dict[str, torch.Tensor]]  # (model, batch) -> sums
Evaluation = Callable[[Any], dict[str, float]]  # model -> figures


@dataclass
class Stage:
    """One phase of a run: what differs from phase to phase, and nothing else.

    Attributes:
        trains: the modules that are trained; every other part of the model is frozen and in evaluation mode.
        stream: endless training batches.
        compute_loss: model and batch to one *sum* for each loss term, over the rows of this rank; the target counts of
            all ranks are ``batch.counts``.
        evaluate: held-out figures, computed under ``no_grad`` in evaluation mode; its random numbers are its own.
        config: length, batch size and learning rate.
        weights: factor of each loss term.
        unit: what throughput counts; a key of ``batch.counts``.
        lr_ratios: learning rate of each of ``trains`` over the phase's; empty: 1 for all.
        after_update: called after every accepted update, for state that is not trained by gradient.
        after_skip: called when a batch was skipped, so that such state forgets it.
    """

    trains: list[nn.Module]
    stream: StreamLike
    compute_loss: LossFunction
    evaluate: Evaluation
    config: PhaseConfig
    weights: dict[str, float]
    unit: str
    after_update: Callable[[], None] | None = None
    after_skip: Callable[[], None] | None = None
    lr_ratios: list[float] = field(default_factory=list)


@dataclass
class Run:
    """Everything that a stage script hands to the loop.

    Attributes:
        kind: name of the final checkpoint without ``.pt``, for example ``thinker``.
        model: all modules of the stage; its whole state dict goes into every checkpoint.
        phases: names and builders, in order. A builder is called when its phase begins, after the earlier ones ended.
        model_config: what is needed to build the model again from the checkpoint alone.
        assets: files by name, such as ``tokenizer.model``; they stand in ``save_dir`` and in every checkpoint.
        lineage: hashes of data, tokenizer and input checkpoints. A resume with other ones is refused.
        export: from the model's state dict the weights that others read from a checkpoint; None: as they are. A run
            that goes on from it gets back its own.
        data_may_change: other data are a warning: files that turn bad are to be left out.
    """

    kind: str
    model: nn.Module
    phases: list[tuple[str, Callable[[], Stage]]]
    model_config: dict[str, Any]
    assets: dict[str, bytes] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    export: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    data_may_change: bool = False
