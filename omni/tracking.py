"""What a run reports: ``metrics.jsonl``, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omni.config import UserError
from omni.console import log


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, continued exactly where a checkpoint left it.

    Everything that depends on the clock stands under ``timing``, so that two runs can be compared line by line.
    """

    def __init__(self, path: Path, position: int) -> None:
        """Open the file and cut it at ``position`` bytes, dropping lines written after the checkpoint."""
        self._path = path
        with self._disk_errors():
            self._file = path.open("ab")
            self._file.truncate(min(position, path.stat().st_size))
            self._file.seek(0, os.SEEK_END)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and hand it to the operating system."""
        with self._disk_errors():
            self._file.write(json.dumps(_without_nan(record), allow_nan=False).encode() + b"\n")
            self._file.flush()

    def position(self) -> int:
        """Bytes written so far; they are on the disk."""
        with self._disk_errors():
            os.fsync(self._file.fileno())
            return self._file.tell()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}); make room, and the same command continues"
            ) from None

    def close(self) -> None:
        """Close the file; what a full disk had refused was reported when it was written."""
        with suppress(OSError):
            self._file.close()


class NoMetrics(MetricsLog):
    """What a rank other than the first writes: nothing."""

    def __init__(self) -> None:
        pass

    def write(self, record: dict[str, Any]) -> None:
        """Rank 0 writes it."""

    def position(self) -> int:
        """Rank 0 knows it."""
        return 0

    def close(self) -> None:
        """There is nothing to close."""


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither NaN nor Inf: null stands for them."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


class Progress:
    """A bar on a terminal; elsewhere only the lines that are logged, so that a log file stays readable."""

    def __init__(self, phase: str, step: int, max_steps: int) -> None:
        self._bar = tqdm(
            total=max_steps,
            initial=step,
            desc=phase,
            disable=not sys.stdout.isatty(),
            dynamic_ncols=True,
            file=sys.stdout,
        )
        self._max_steps = max_steps
        self._first_step = step
        self._start = time.perf_counter()

    def advance(self, figures: dict[str, float]) -> None:
        """One step is done."""
        if not self._bar.disable:
            self._bar.set_postfix_str(" ".join(f"{name} {value:.4g}" for name, value in figures.items()), refresh=False)
            self._bar.update()

    def line(self, step: int, text: str) -> None:
        """Log one line about a step, with the time left."""
        rate = (time.perf_counter() - self._start) / max(1, step - self._first_step)
        left = int(rate * (self._max_steps - step))
        with tqdm.external_write_mode(file=sys.stdout):
            log.info("step %d/%d | %s | %d:%02d left", step, self._max_steps, text, left // 60, left % 60)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def format_figures(figures: dict[str, float]) -> str:
    """Figures as ``loss 2.31 | wer 0.12``."""
    return " | ".join(f"{name} {value:.4g}" for name, value in figures.items())
