"""Processes that begin as forks of one that has imported torch: another start takes seconds, and this one none.

The server is Python's own (``multiprocessing``, start method "forkserver"), one for all tests of a process. It computes
nothing and starts no thread, so a fork begins like a new process. What a test asks of a start itself - exit codes of a
script, what must not be imported - is asked of a real one (:func:`tests.conftest.command`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")
# every optimizer imports torch._dynamo, which takes longer than a small run
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "omni.training_utils", "omni.audio", "train_talker", "train_vision", "train_audio_enc"]
)


class Child:
    """A fork that is at work, in the manner of ``subprocess.Popen``; what it says goes to a file.

    Args:
        target: a function that another process can import; its process ends with it.
        arguments: of the function.
        log: where stdout and stderr go; may be a terminal.
        group: whether it leads a group of processes of its own.
        environment: variables that are others than here.
    """

    def __init__(
        self,
        target: Callable[..., None],
        arguments: Sequence[Any],
        log: Path,
        group: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        self._process = _CONTEXT.Process(target=_begin, args=(target, arguments, log, group, environment or {}))
        with contextlib.chdir(ROOT):  # where the server, once it starts, finds what it is to import
            self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit code, minus a signal's number, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout: float = 280) -> int:
        """Wait for its end; returns the exit code. Raises TimeoutExpired, after which it is dead."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(str(self.log), timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 280) -> tuple[str, None]:
        """Wait for its end; returns what it said."""
        self.wait(timeout)
        return self.log.read_text(), None

    def send_signal(self, sent: int) -> None:
        """As ``os.kill``; to one that has ended, nothing."""
        if self._process.exitcode is None:
            os.kill(self.pid, sent)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start_module(name: str, *words: str | Path, log: Path, **options: Any) -> Child:
    """What ``python -m name words ...`` runs, or ``python name.py``, in the repository's folder."""
    return Child(_run_module, (name, [*map(str, words)]), log, **options)


def _run_module(name: str, words: list[str]) -> None:
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _begin(
    target: Callable[..., None], arguments: Sequence[Any], log: Path, group: bool, environment: dict[str, str]
) -> None:
    if group:
        os.setsid()
    os.chdir(ROOT)
    os.environ.update(environment)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o644)
    for number in (1, 2):
        os.dup2(opened, number)
    os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    target(*arguments)
