"""The one training loop of all five stages.

A stage script describes a :class:`Run`: a model and an ordered list of phases, each a :class:`Stage` that says what is
trained, on which batches, by which loss and how it is evaluated. Everything else is here: mixed precision, warm-up and
cosine, accumulation, clipping, guards against NaN and exploding gradients, validation, checkpoints, and a resume that
continues bit for bit. The loop knows no modality: to it a batch is something with target counts, and a loss is a sum.

The loss of a step is ``sum over terms of weight * (sum of the term) / (targets of the term)``, with the targets counted
over all micro-batches and ranks of the step before the first of them is computed. Accumulating k micro-batches is
therefore the same as one large batch, also when they have unequal numbers of targets, and so is sharing each of them
among N ranks (:mod:`omni.ranks`). All ranks take the same decisions, because they take them on the same sums; rank 0
alone validates, writes and speaks.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from omni import ranks
from omni.anomaly import AnomalyWatch
from omni.boards import Boards, open_boards
from omni.checkpoint import claim_folder
from omni.command_line import read_command_line
from omni.config import PhaseConfig, RunConfig, StageConfig, UserError, changed_keys, to_dict
from omni.console import log, user_errors
from omni.guards import check_gradient_explosion, clip_gradients, validate_loss
from omni.optim import build_optimizer, get_lr_scheduler, lr_ratio, restore_optimizer, trainable_parameters
from omni.planning import out_of_memory, settle_batch_sizes
from omni.runtime import (
    Precision,
    free_memory,
    isolated_randomness,
    prepare_blocks,
    random_state,
    restore_random_state,
    seed_everything,
    setup_compute,
)
from omni.save_folder import SaveFolder
from omni.tracking import MetricsLog, NoMetrics, Progress, format_figures
from omni.training_types import BatchLike, Run, RunState, Stage

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


class Loop:
    """Runs the phases of one :class:`Run` and keeps its promises; see the module's docstring."""

    _signal: int | None = None
    _signal_at = 0.0
    _agreed: int | None = None  # the signal that all ranks know of

    def __init__(self, run: Run, config: StageConfig, precision: Precision, fresh: bool = False) -> None:
        self.run, self.config, self.precision = run, config, precision
        self.options: RunConfig = config.run
        prepare_blocks(run.model, config.run)
        self._watch = AnomalyWatch(run.model) if config.run.detect_anomaly else None
        with ranks.first():
            self.folder = SaveFolder(config.save_dir, run, fresh, config.run.keep_last)
            self._training = self.folder.resume(config.run.seed)  # optimizer and stream state, until its phase begins
        if len(set(ranks.gather("what to continue from", str(self.folder.last_good)))) > 1:
            raise UserError(
                f"save_dir: {config.save_dir} differs between ranks, expected a folder that all machines share"
            )
        self.state = RunState(**self._training["progress"]) if self._training else RunState()
        if self._training:
            log.info("resuming from %s (phase %s, step %d)", self.folder.last_good, self.phase_name, self.state.step)
        position = self._training["metrics"] if self._training else 0
        self.metrics = NoMetrics() if ranks.rank() else MetricsLog(self.folder.path / "metrics.jsonl", position)

    # ---- the run ----

    def train(self) -> None:
        """Run every phase that is left, then write the final checkpoint."""
        if self._finished():
            log.info("%s: complete, nothing to do (--fresh starts over)", self.folder.final)
            return
        self.folder.begin(to_dict(self.config))
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                self._run_phase(*self.run.phases[self.state.phase])
                if self.state.phase == len(self.run.phases) - 1:
                    break
                self.state.next_phase()
            self._save(self.folder.final.name)
            log.info("saved %s", self.folder.final)
        except RuntimeError as error:  # raised by torch in the middle of whatever is being done
            if not re.match(r"DataLoader worker \(pid", str(error)):  # else it is what went wrong inside of one
                raise
            raise UserError(
                f"a process that prepares batches was killed, perhaps for want of memory ({str(error).split('.')[0]}); "
                f"lower num_workers or batch_size. {self.folder.standing()}"
            ) from None
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.metrics.close()

    @property
    def phase_name(self) -> str:
        """The phase that is being trained."""
        return self.run.phases[self.state.phase][0]

    def _finished(self) -> bool:
        last_phase = self.state.phase == len(self.run.phases) - 1
        if not (last_phase and self._training and self.folder.final.exists()):
            return False
        return self.state.stopped_early or self.state.step >= self._phase_config(self.state.phase).max_steps

    def _phase_config(self, phase: int) -> PhaseConfig:
        name = self.run.phases[phase][0]
        found = getattr(self.config, name)
        assert isinstance(found, PhaseConfig), f"phase {name} must be named as its PhaseConfig in the configuration"
        return found

    def _run_phase(self, name: str, build: Callable[[], Stage]) -> None:
        """Train one phase from wherever it stands."""
        set_lr = self._begin_phase(name, build)
        stage = self.stage
        self.boards = Boards()
        if ranks.rank() == 0:
            self.boards = open_boards(self.options, self.folder.path, self.config.name, name, self.state.step)
        self.progress = Progress(name, self.state.step, stage.config.max_steps)
        try:
            self._heed_signal()
            while self.state.step < stage.config.max_steps and not self.state.stopped_early:
                self._step(name, set_lr)
                self._heed_signal()
        finally:
            stage.stream.close()
            self.progress.close()
            self.boards.close()
        if self.state.phase < len(self.run.phases) - 1:
            self._save_periodic()

    def _begin_phase(self, name: str, build: Callable[[], Stage]) -> Callable[[int], float]:
        """Build a phase with its optimizer, where it stands; returns what sets the learning rate of a step."""
        if self._training is None:
            # a phase's initial values and batches must not depend on how the phase before it was interrupted
            seed_everything(self.options.seed + 1000 * (self.state.phase + 1))
        self.run.model.eval()
        with self.precision.autocast():  # what a phase prepares (features, codes, alignments) is inference
            stage = build()
        self.run.model.requires_grad_(False)
        for module in stage.trains:
            module.requires_grad_(True)
        self.named = trainable_parameters(stage.trains)
        self.parameters = [parameter for _, parameter in self.named]
        self.stage, self.optimizer = stage, build_optimizer(self.named, stage.config, stage.lr_ratios)
        self.scaler = torch.amp.GradScaler(self.precision.device.type, enabled=self.precision.needs_scaler)
        set_lr = get_lr_scheduler(
            self.optimizer, stage.config.warmup_steps, stage.config.max_steps, stage.config.min_lr_ratio
        )
        if self._training is not None:
            restore_optimizer(self.optimizer, self._training["optimizer"], f"{name}.optimizer")
            self.scaler.load_state_dict(self._training["scaler"])
            stage.stream.load_state_dict(self._training["stream"])
        self._begin_randomness()
        self._train_mode()
        ranks.same_weights(self.run.model)
        self._training = None
        millions = sum(parameter.numel() for parameter in self.parameters) / 1e6
        log.info(
            "%s | phase %s | %d steps of %d x %d | %.2f M trained parameters | %s on %s",
            self.run.kind, name, stage.config.max_steps, stage.config.gradient_accumulation_steps,
            stage.config.batch_size, millions, self.precision.name,
            self.precision.device if ranks.size() == 1 else f"{ranks.size()} ranks ({self.precision.device.type})",
        )  # fmt: skip
        return set_lr

    def _begin_randomness(self) -> None:
        """The random numbers of dropout: those of the checkpoint, or of the phase's beginning. Ranks differ in them."""
        others = self._training["others"] if self._training and "others" in self._training else []
        if self._training is not None and ranks.rank() == 0:
            restore_random_state(self._training["random"])
        elif self._training is not None and len(others) == ranks.size() - 1:
            restore_random_state(others[ranks.rank() - 1])
        elif ranks.rank() > 0:  # a new phase, or a resume with another number of ranks
            seed_everything(self.options.seed + 1000 * (self.state.phase + 1) + self.state.step + 10**6 * ranks.rank())

    def _step(self, name: str, set_lr: Callable[[int], float]) -> None:
        """One update, and whatever is due after it."""
        state, stage = self.state, self.stage
        started = time.perf_counter()
        set_lr(state.step)
        lr = stage.config.lr * lr_ratio(
            state.step, stage.config.warmup_steps, stage.config.max_steps, stage.config.min_lr_ratio
        )
        position, (batches, rows) = stage.stream.state_dict(), self._fetch()
        loss, norm, problem = self._update(batches)
        state.step += 1
        state.total_step += 1
        if problem:
            self._skip(name, problem, position, rows)
        else:
            state.skipped_in_a_row = 0
            state.window_loss += loss
            state.window_steps += 1
        unit = f"{name}.{stage.unit}"
        targets = sum(batch.counts[stage.unit] for batch in batches)
        state.seen[unit] = state.seen.get(unit, 0) + targets
        elapsed = time.perf_counter() - started
        state.seconds += elapsed
        state.window_seen += targets
        state.window_seconds += elapsed
        self.progress.advance({"loss": loss, "lr": lr, "grad": norm, f"{stage.unit}/s": targets / elapsed})
        last = state.step == stage.config.max_steps
        if state.step % self.options.print_freq == 0 or last:
            self._report(name, lr, norm)
        if state.step % self.options.val_freq == 0 or last:
            self._validate(name)
        if state.step % self.options.checkpoint_freq == 0 and not last and self._told_to_stop is None:
            self._save_periodic()

    def _fetch(self) -> tuple[list[BatchLike], list[int]]:
        """The micro-batches of a step and the rows that they hold."""
        stream, batches, rows = self.stage.stream, [], []
        position = stream.state_dict()
        try:
            for _ in range(self.stage.config.gradient_accumulation_steps):
                batches.append(next(stream))
                rows += stream.rows
        except UserError as error:  # nothing of this step is done: what was trained until here is kept
            stream.load_state_dict(position)
            if self.state.total_step:
                self._save_periodic()
            raise UserError(f"{error}. {self.folder.standing()}") from None
        return batches, rows

    def _heed_signal(self) -> None:
        """Save and leave, if a signal has asked for it."""
        if self._told_to_stop is not None:
            self._save_periodic()
            log.info("stopped by signal %d after saving; the same command continues", self._told_to_stop)
            raise SystemExit(128 + self._told_to_stop)

    @property
    def _told_to_stop(self) -> int | None:
        """The signal to leave by: of several ranks, one that all of them know of, so that they leave together."""
        return self._signal if ranks.size() == 1 else self._agreed

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
        if self._watch:
            self._watch.begin()
        loss_sum = torch.zeros((), device=self.precision.device)
        problem = None
        try:
            for batch in batches:
                with self.precision.autocast():
                    terms = self.stage.compute_loss(self.run.model, batch.to(self.precision.device))
                loss = self._weighted(terms, totals)
                if loss.requires_grad:  # a batch may hold nothing for what is trained: chats of text for projectors
                    self.scaler.scale(loss).backward()
                loss_sum += loss.detach()
        except FloatingPointError as error:  # raised by a model that found NaN or Inf in its outputs
            problem = str(error)
        step = ranks.add_up(float(loss_sum), problem, self._signal, self.parameters)
        value, problem, self._agreed = step.loss, step.problem, step.signal
        if problem is not None:
            return float("nan"), float("nan"), problem
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

    def _skip(self, name: str, problem: str, position: dict[str, Any], rows: list[int]) -> None:
        """Count and log a skipped batch; ``position`` and ``rows`` say which data it held."""
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        if self.stage.after_skip is not None:
            self.stage.after_skip()
        if self._watch:
            problem += f"; {self._report_anomaly(self._watch)}"
        where = [self.stage.stream.where(row) for row in rows]
        data = {"epoch": position["epoch"], "batch": position["used"], "rows": where}
        self.metrics.write({"phase": name, "step": state.step, "event": "skip", "why": problem, **data})
        shown = ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
        log.warning("step %d: batch skipped: %s; rows %s", state.step, problem, shown)
        if state.skipped_in_a_row >= self.options.max_consecutive_skips:
            raise UserError(
                f"{name}: {state.skipped_in_a_row} batches in a row were skipped, the last at step {state.step} "
                f"({problem}; rows {shown}). {self.folder.standing()}. "
                "Lower lr, raise max_grad_explosion, look at these rows, or find the place with --detect_anomaly"
            )

    def _report_anomaly(self, watch: AnomalyWatch) -> str:
        """Where it began; of several ranks, what the one says in which a module's output was not finite."""
        reports = ranks.gather("what went wrong", (watch.found, watch.report(self.named)))
        chosen = next((number for number, (found, _) in enumerate(reports) if found), 0)
        return reports[chosen][1] + (f" (rank {chosen})" if ranks.size() > 1 else "")

    # ---- reports, validation, checkpoints ----

    def _report(self, name: str, lr: float, norm: float) -> None:
        state = self.state
        loss = state.window_loss / state.window_steps if state.window_steps else math.nan  # all were skipped
        figures = {"loss": loss, "lr": lr, "grad_norm": norm}
        throughput = state.window_seen / state.window_seconds
        state.window_loss, state.window_steps, state.window_seen, state.window_seconds = 0.0, 0, 0, 0.0
        seen = state.seen[f"{name}.{self.stage.unit}"]
        counters = {"epoch": self.stage.stream.epoch, "seen": seen, "skipped": state.skipped}
        counters["bad_samples"] = self.stage.stream.num_bad
        timing = {"seconds": round(state.seconds, 3), "throughput": round(throughput, 1)}
        record = {"phase": name, "step": state.step, "event": "train", **figures, **counters, "timing": timing}
        self.metrics.write(record)
        self.boards.write("train", figures, state.step)
        self.progress.line(state.step, f"{format_figures(figures)} | {throughput:.4g} {self.stage.unit}/s")

    def _validate(self, name: str) -> None:
        """Evaluate, remember the best, and stop early when the monitor no longer improves."""
        state, config = self.state, self.stage.config
        figures = state.figures[name] = ranks.by_first(self._figures)
        self._train_mode()
        self.metrics.write({"phase": name, "step": state.step, "event": "val", **figures})
        self.boards.write("val", figures, state.step)
        self.progress.line(state.step, "validation: " + format_figures(figures))
        if config.monitor not in figures:
            raise UserError(f"{name}.monitor: found {config.monitor!r}, expected one of {', '.join(figures)}")
        figure = figures[config.monitor] * (1 if config.monitor_mode == "min" else -1)
        if figure < (math.inf if state.best is None else state.best - config.min_delta):  # NaN is never the best
            state.best, state.stale = figure, 0
            self._save(f"{self.run.kind}_best.pt", training=False)
            return
        state.stale += 1
        if config.patience and state.stale >= config.patience:
            state.stopped_early = True
            log.info("stopping early: %s has not improved in %d validations", config.monitor, state.stale)

    def _figures(self) -> dict[str, float]:
        """The held-out figures; the random numbers of training stay as they are."""
        self.run.model.eval()
        with torch.no_grad(), isolated_randomness(self.options.seed), self.precision.autocast():
            try:
                return self.stage.evaluate(self.run.model)
            except UserError as error:
                raise UserError(f"{error}. {self.folder.standing()}") from None

    def _save_periodic(self) -> None:
        self._save(f"{self.run.kind}_step_{self.state.total_step}.pt")

    def _save(self, name: str, training: bool = True) -> None:
        """Write a checkpoint; without ``training`` it holds the weights alone and cannot be resumed from."""
        own = self.run.model.state_dict()
        shown = own if self.run.export is None else self.run.export(own)
        tensors: dict[str, Any] = {"weights": shown}
        if training:
            randomness = ranks.gather("the random states", random_state())
            tensors["training"] = {
                # what others do not read; without an export, nothing
                "own_weights": {key: value for key, value in own.items() if shown.get(key) is not value},
                "progress": vars(self.state),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "stream": self.stage.stream.state_dict(),
                "random": randomness[0],
                "others": randomness[1:],  # of the other ranks
                "metrics": self.metrics.position(),
            }
        self.folder.save(name, tensors, self._summary(training))

    def _summary(self, training: bool) -> dict[str, Any]:
        state = self.state
        parts = {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in self.run.model.named_children()
        }
        return {
            "phase": self.phase_name,
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
            "changed": list(changed_keys(self.config)),
        }

    def _on_signal(self, number: int, frame: Any) -> None:
        """Remember the signal; the loop saves and leaves after the current step. A second one leaves at once.

        To one of several ranks a second one soon after is the same once more: a batch system tells all processes, and
        torchrun tells its own.
        """
        if self._signal is None:
            self._signal, self._signal_at = number, time.monotonic()
        elif ranks.size() == 1 or time.monotonic() > self._signal_at + 5:
            raise SystemExit(128 + number)


Build = Callable[[Any, Precision], Run]
_ROOM = 0.9  # of the free memory, for a batch size of "auto": the rest is what lies between blocks


def _script(build: Build) -> str:
    """The file in which a stage is written."""
    return build.__code__.co_filename


def _settled(config: Any, build: Build, precision: Precision, fresh: bool) -> Any:
    """The configuration with a number where a batch size is "auto": the same one on all ranks."""
    kind, room = precision.device.type, int(_ROOM * free_memory(precision.device))
    room = min(ranks.gather("free memory", room))
    many = ranks.size()
    return ranks.by_first(lambda: settle_batch_sizes(config, _script(build), kind, room, many, fresh))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a CPU torch says so in words alone."""
    return (
        not isinstance(error, RuntimeError)
        or isinstance(error, torch.OutOfMemoryError)
        or ("can't allocate memory" in str(error) or "not enough memory" in str(error))
    )


def run_stage(config_class: type[StageConfig], build: Build, arguments: Sequence[str] | None = None) -> int:
    """The whole command of a stage script: read the configuration, build the run, train it from where it stands.

    Returns the exit code: 0, 1 for a mistake in what the user gave, 2 for wrong usage, 130 / 143 after Ctrl-C / TERM.
    """

    def main() -> None:
        words = list(sys.argv[1:] if arguments is None else arguments)
        config, fresh = read_command_line(config_class, words)
        precision = setup_compute(config.run)
        with (
            ranks.together(precision.device, config.run.rank_timeout),
            contextlib.nullcontext() if ranks.rank() else claim_folder(config.save_dir),
        ):
            config = _settled(config, build, precision, fresh)
            seed_everything(config.run.seed)
            run = build(config, precision)
            run.model.to(precision.device)
            loop = Loop(run, config, precision, fresh)
            try:
                loop.train()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                why, phase = str(error).partition(".")[0] or "no memory was left", loop.phase_name
                standing = loop.folder.standing()
                del loop, run, error  # the plan needs some memory as well
                raise out_of_memory(config, _script(build), phase, precision.device.type, why, standing) from None

    return user_errors(ranks.one_voice(main))
