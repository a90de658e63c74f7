"""The one training loop of all five stages.

A stage script describes a :class:`Run`: a model and an ordered list of phases, each a :class:`Stage` that says what is
trained, on which batches, by which loss and how it is evaluated. Everything else is here: mixed precision, warm-up and
cosine, accumulation, clipping, guards against NaN and exploding gradients, validation, checkpoints, and a resume that
continues bit for bit. The loop knows no modality: to it a batch is something with target counts, and a loss is a sum.

The loss of a step is ``sum over terms of weight * (sum of the term) / (targets of the term)``, with the targets counted
over all micro-batches of the step before the first of them is computed. Accumulating k micro-batches is therefore the
same as one large batch, also when they have unequal numbers of targets.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from omni import checkpoint
from omni.config import PhaseConfig, RunConfig, StageConfig, UserError, read_command_line, to_dict
from omni.console import log, user_errors
from omni.guards import check_gradient_explosion, clip_gradients, validate_loss
from omni.optim import build_optimizer, get_lr_scheduler, restore_optimizer, trainable_parameters
from omni.runtime import (
    Precision,
    isolated_randomness,
    random_state,
    restore_random_state,
    seed_everything,
    setup_compute,
)
from omni.tracking import MetricsLog, Progress, TensorBoard, format_figures
from omni.training_types import BatchLike, Run, Stage

__all__ = [
    "Loop",
    "Run",
    "Stage",
    "check_gradient_explosion",
    "clip_gradients",
    "get_lr_scheduler",
    "run_stage",
    "validate_loss",
]


@dataclass
class _Progress:
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
    figures: dict[str, dict[str, float]] = field(default_factory=dict)  # last validation of each phase


class Loop:
    """Runs the phases of one :class:`Run` and keeps its promises; see the module's docstring."""

    def __init__(self, run: Run, config: StageConfig, precision: Precision, fresh: bool = False) -> None:
        self.run, self.config, self.precision = run, config, precision
        self.options: RunConfig = config.run
        self.save_dir = config.save_dir
        self.state = _Progress()
        self._training: dict[str, Any] | None = None  # loaded optimizer and stream state, until its phase begins
        self._signal: int | None = None
        self._lock = checkpoint.claim_folder(self.save_dir, fresh)
        self._resume()
        self.metrics = MetricsLog(self.save_dir / "metrics.jsonl", self._training["metrics"] if self._training else 0)
        for name, data in run.assets.items():
            (self.save_dir / name).write_bytes(data)
        (self.save_dir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")

    # ---- resume ----

    def _resume(self) -> None:
        """Continue from the newest undamaged checkpoint of ``save_dir``, if there is one."""
        for path, summary, tensors, problem in checkpoint.resume_candidates(self.save_dir, self.run.kind):
            if tensors is None:
                log.warning("passing over %s", problem)
                continue
            checkpoint.refuse_another_run(path, summary, self.run.model_config, self.run.lineage)
            checkpoint.load_weights(self.run.model, tensors["weights"], str(path))
            self._training = tensors["training"]
            self.state = _Progress(**self._training["progress"])
            log.info(
                "resuming from %s (phase %s, step %d)", path, self.run.phases[self.state.phase][0], self.state.step
            )

    # ---- the run ----

    def train(self) -> None:
        """Run every phase that is left, then write the final checkpoint."""
        if self._finished():
            log.info("%s: complete, nothing to do (--fresh starts over)", self.save_dir / f"{self.run.kind}.pt")
            return
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self.state.phase < len(self.run.phases):
                self._run_phase(*self.run.phases[self.state.phase])
                if self.state.phase == len(self.run.phases) - 1:
                    break
                self._next_phase()
            self._save(self.save_dir / f"{self.run.kind}.pt")
            log.info("saved %s", self.save_dir / f"{self.run.kind}.pt")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.metrics.close()

    def _finished(self) -> bool:
        final = self.save_dir / f"{self.run.kind}.pt"
        last_phase = self.state.phase == len(self.run.phases) - 1
        if not (last_phase and self._training and final.exists()):
            return False
        stage_config = self._phase_config(self.state.phase)
        return self.state.stopped_early or self.state.step >= stage_config.max_steps

    def _phase_config(self, phase: int) -> PhaseConfig:
        name = self.run.phases[phase][0]
        found = getattr(self.config, name)
        assert isinstance(found, PhaseConfig), f"phase {name} must be named as its PhaseConfig in the configuration"
        return found

    def _next_phase(self) -> None:
        self.state.phase += 1
        self.state.step = self.state.stale = 0
        self.state.best, self.state.stopped_early = None, False
        self.state.window_loss, self.state.window_steps = 0.0, 0

    def _run_phase(self, name: str, build: Callable[[], Stage]) -> None:
        """Train one phase from wherever it stands."""
        if self._training is None:
            # a phase's initial values and batches must not depend on how the phase before it was interrupted
            seed_everything(self.options.seed + 1000 * (self.state.phase + 1))
        self.run.model.eval()
        with self.precision.autocast():  # what a phase prepares (features, codes, alignments) is inference
            stage = build()
        self.run.model.requires_grad_(False)
        for module in stage.trains:
            module.requires_grad_(True)
        named = trainable_parameters(stage.trains)
        self.parameters = [parameter for _, parameter in named]
        self.stage, self.optimizer = stage, build_optimizer(named, stage.config)
        self.scaler = torch.amp.GradScaler(self.precision.device.type, enabled=self.precision.needs_scaler)
        set_lr = get_lr_scheduler(
            self.optimizer, stage.config.warmup_steps, stage.config.max_steps, stage.config.min_lr_ratio
        )
        if self._training is not None:
            restore_optimizer(self.optimizer, self._training["optimizer"], f"{name}.optimizer")
            self.scaler.load_state_dict(self._training["scaler"])
            stage.stream.load_state_dict(self._training["stream"])
            restore_random_state(self._training["random"])
            self._training = None
        millions = sum(parameter.numel() for parameter in self.parameters) / 1e6
        log.info(
            "%s | phase %s | %d steps of %d x %d | %.2f M trained parameters | %s on %s",
            self.run.kind, name, stage.config.max_steps, stage.config.gradient_accumulation_steps,
            stage.config.batch_size, millions, self.precision.name, self.precision.device,
        )  # fmt: skip
        self.board = TensorBoard(self.save_dir / "tensorboard" / name, self.options.tensorboard, self.state.step)
        self.progress = Progress(name, self.state.step, stage.config.max_steps)
        try:
            while self.state.step < stage.config.max_steps and not self.state.stopped_early:
                self._step(name, set_lr)
        finally:
            self.progress.close()
            self.board.close()
        if self.state.phase < len(self.run.phases) - 1:
            self._save_periodic()

    def _step(self, name: str, set_lr: Callable[[int], float]) -> None:
        """One update, and whatever is due after it."""
        state, stage = self.state, self.stage
        started = time.perf_counter()
        self._train_mode()
        lr = set_lr(state.step)
        batches = [next(stage.stream) for _ in range(stage.config.gradient_accumulation_steps)]
        loss, norm, problem = self._update(batches)
        state.step += 1
        state.total_step += 1
        if problem:
            self._skip(name, problem)
        else:
            state.skipped_in_a_row = 0
            state.window_loss += loss
            state.window_steps += 1
        unit = f"{name}.{stage.unit}"
        targets = sum(batch.counts[stage.unit] for batch in batches)
        state.seen[unit] = state.seen.get(unit, 0) + targets
        elapsed = time.perf_counter() - started
        state.seconds += elapsed
        self.progress.advance({"loss": loss, "lr": lr, "grad": norm, f"{stage.unit}/s": targets / elapsed})
        last = state.step == stage.config.max_steps
        if state.step % self.options.print_freq == 0 or last:
            self._report(name, lr, norm, targets / elapsed)
        if state.step % self.options.val_freq == 0 or last:
            self._validate(name)
        if self._signal is not None:
            self._save_periodic()
            log.info("stopped by signal %d after saving; the same command continues", self._signal)
            raise SystemExit(128 + self._signal)
        if state.step % self.options.checkpoint_freq == 0 and not last:
            self._save_periodic()

    def _train_mode(self) -> None:
        """Training mode for what is trained, evaluation mode for what is frozen."""
        self.run.model.eval()
        for module in self.stage.trains:
            module.train()

    def _update(self, batches: list[BatchLike]) -> tuple[float, float, str | None]:
        """Forward, backward and update; returns loss, gradient norm, and why the batch was skipped, if it was."""
        totals: dict[str, int] = {}
        for batch in batches:
            for term, count in batch.counts.items():
                totals[term] = totals.get(term, 0) + count
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.precision.device)
        try:
            for batch in batches:
                with self.precision.autocast():
                    terms = self.stage.compute_loss(self.run.model, batch.to(self.precision.device))
                loss = self._weighted(terms, totals)
                if loss.requires_grad:  # a batch may hold nothing for what is trained: chats of text for projectors
                    self.scaler.scale(loss).backward()
                loss_sum += loss.detach()
        except FloatingPointError as error:  # raised by a model that found NaN or Inf in its outputs
            return float("nan"), float("nan"), str(error)
        value = float(loss_sum)
        if all(parameter.grad is None for parameter in self.parameters):
            return value, 0.0, validate_loss(value, self.options.min_loss, self.options.max_loss)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.options.max_grad_norm)
        problem = validate_loss(value, self.options.min_loss, self.options.max_loss) or check_gradient_explosion(
            norm, self.options.max_grad_explosion
        )
        if problem is None:
            self.scaler.step(self.optimizer)
            if self.stage.after_update is not None:
                self.stage.after_update()
        self.scaler.update()
        return value, norm, problem

    def _weighted(self, terms: dict[str, torch.Tensor], totals: dict[str, int]) -> torch.Tensor:
        loss = torch.zeros((), device=self.precision.device)
        for term, total in terms.items():
            loss = loss + self.stage.weights[term] * total.float() / max(1, totals[term])
        return loss

    def _skip(self, name: str, problem: str) -> None:
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        if self.stage.after_skip is not None:
            self.stage.after_skip()
        record = {"phase": name, "step": state.step, "event": "skip", "why": problem, "rows": self.stage.stream.rows}
        self.metrics.write(record)
        log.warning("step %d: batch skipped: %s; rows %s", state.step, problem, self.stage.stream.rows[:8])
        if state.skipped_in_a_row >= self.options.max_consecutive_skips:
            raise UserError(
                f"{name}: {state.skipped_in_a_row} batches in a row were skipped, the last at step {state.step} "
                f"({problem}; rows {self.stage.stream.rows[:8]}); the last good checkpoint stays in {self.save_dir}. "
                "Lower lr, raise max_grad_explosion, or look at these rows"
            )

    # ---- reports, validation, checkpoints ----

    def _report(self, name: str, lr: float, norm: float, throughput: float) -> None:
        state = self.state
        loss = state.window_loss / max(1, state.window_steps)
        figures = {"loss": loss, "lr": lr, "grad_norm": norm}
        state.window_loss, state.window_steps = 0.0, 0
        seen = state.seen[f"{name}.{self.stage.unit}"]
        counters = {"epoch": self.stage.stream.epoch, "seen": seen, "skipped": state.skipped}
        timing = {"seconds": round(state.seconds, 3), "throughput": round(throughput, 1)}
        record = {"phase": name, "step": state.step, "event": "train", **figures, **counters, "timing": timing}
        self.metrics.write(record)
        self.board.write("train", figures, state.step)
        self.progress.line(state.step, f"{format_figures(figures)} | {throughput:.4g} {self.stage.unit}/s")

    def _validate(self, name: str) -> None:
        """Evaluate, remember the best, and stop early when the monitor no longer improves."""
        state, config = self.state, self.stage.config
        self.run.model.eval()
        with torch.no_grad(), isolated_randomness(self.options.seed), self.precision.autocast():
            figures = self.stage.evaluate(self.run.model)
        state.figures[name] = figures
        self.metrics.write({"phase": name, "step": state.step, "event": "val", **figures})
        self.board.write("val", figures, state.step)
        self.progress.line(state.step, "validation: " + format_figures(figures))
        if config.monitor not in figures:
            raise UserError(f"{name}.monitor: found {config.monitor!r}, expected one of {', '.join(figures)}")
        figure = figures[config.monitor] * (1 if config.monitor_mode == "min" else -1)
        if state.best is None or figure < state.best - config.min_delta:
            state.best, state.stale = figure, 0
            self._save(self.save_dir / f"{self.run.kind}_best.pt", training=False)
            return
        state.stale += 1
        if config.patience and state.stale >= config.patience:
            state.stopped_early = True
            log.info("stopping early: %s has not improved in %d validations", config.monitor, state.stale)

    def _save_periodic(self) -> None:
        self._save(self.save_dir / f"{self.run.kind}_step_{self.state.total_step}.pt")
        checkpoint.prune(self.save_dir, self.run.kind, self.options.keep_last)

    def _save(self, path: Path, training: bool = True) -> None:
        """Write a checkpoint; without ``training`` it holds the weights alone and cannot be resumed from."""
        tensors: dict[str, Any] = {
            "weights": self.run.model.state_dict(),
            "assets": {
                name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in self.run.assets.items()
            },
        }
        if training:
            tensors["training"] = {
                "progress": vars(self.state),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "stream": self.stage.stream.state_dict(),
                "random": random_state(),
                "metrics": self.metrics.position(),
            }
        checkpoint.save_checkpoint(path, tensors, self._summary(training))

    def _summary(self, training: bool) -> dict[str, Any]:
        state = self.state
        parts = {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in self.run.model.named_children()
        }
        return {
            "kind": self.run.kind,
            "phase": self.run.phases[state.phase][0],
            "phases": [name for name, _ in self.run.phases],
            "step": state.step,
            "max_steps": self._phase_config(state.phase).max_steps,
            "total_step": state.total_step,
            "resumable": training,
            "skipped": state.skipped,
            "seen": state.seen,
            "seconds": round(state.seconds, 1),
            "parameters": parts,
            "precision": self.precision.name,
            "figures": state.figures,
            "config": to_dict(self.config),
            "model_config": self.run.model_config,
            "lineage": self.run.lineage,
        }

    def _on_signal(self, number: int, frame: Any) -> None:
        """Remember the signal; the loop saves and leaves after the current step. A second one leaves at once."""
        if self._signal is not None:
            raise SystemExit(128 + number)
        self._signal = number


Build = Callable[[Any, Precision], Run]


def run_stage(config_class: type[StageConfig], build: Build, arguments: Sequence[str] | None = None) -> int:
    """The whole command of a stage script: read the configuration, build the run, train it from where it stands.

    Returns the exit code: 0, 1 for a mistake in what the user gave, 2 for wrong usage, 130 / 143 after Ctrl-C / TERM.
    """

    def main() -> None:
        words = list(sys.argv[1:] if arguments is None else arguments)
        config, fresh = read_command_line(config_class, words)
        precision = setup_compute(config.run)
        seed_everything(config.run.seed)
        run = build(config, precision)
        run.model.to(precision.device)
        Loop(run, config, precision, fresh).train()

    return user_errors(main)
