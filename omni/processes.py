"""Processes that may run side by side, told once of every signal that this process is told of. Needs no torch."""

from __future__ import annotations

import ctypes
import functools
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import IO, Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Children:
    """Starts processes and waits for them; a context manager, since meanwhile signals are passed on to them.

    Each has a process group of its own: Ctrl-C in a terminal reaches a whole group, and a stage that is told twice
    leaves without saving. Here it is told once for every time that this process is told.
    """

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._ended: queue.Queue[str] = queue.Queue()
        self._before: dict[int, Any] = {}
        self._starting = False
        self._late: list[int] = []  # signals that came while a process was being started
        self.told: list[int] = []  # the signals of this process so far

    def __enter__(self) -> Children:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __len__(self) -> int:
        return len(self._running)

    def start(self, name: str, command: Sequence[str], prefix: str = "") -> None:
        """Start a process; with a prefix, its lines are told from others', and it has no terminal to draw on."""
        pipe = subprocess.PIPE if prefix else None
        self._starting = True  # signals wait until it is listed, so that each of them reaches it once
        child = subprocess.Popen(
            list(command), stdout=pipe, stderr=pipe, start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),  # else a stage would train on unseen
            text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        for number in self.told:
            child.send_signal(number)
        self._running[name] = child
        self._starting = False
        while self._late:
            self._pass_on(self._late.pop(0), None)
        threading.Thread(target=self._attend, args=(name, child, prefix), daemon=True).start()

    def wait(self) -> tuple[str, int]:
        """The name of a process that has ended, and its exit code: 128 + n when signal n ended it."""
        name = self._ended.get()
        code = self._running.pop(name).wait()
        return name, code if code >= 0 else 128 - code

    def tell(self, number: int) -> None:
        """Send a signal to all that are running."""
        for child in self._running.values():
            child.send_signal(number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._starting:
            self._late.append(number)
            return
        if not self._running:
            raise KeyboardInterrupt
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self.told.append(number)
        self.tell(number)

    def _attend(self, name: str, child: subprocess.Popen[str], prefix: str) -> None:
        """Pass on what a process writes, to its end; run by a thread of its own."""
        written = ((child.stdout, sys.stdout), (child.stderr, sys.stderr)) if prefix else ()
        readers = [threading.Thread(target=_copy_lines, args=(*pair, prefix), daemon=True) for pair in written]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        child.wait()
        self._ended.put(name)


def usable_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_process(command: Sequence[str]) -> int:
    """Run one process to its end and return its exit code, 128 + n when signal n ended it."""
    with Children() as children:
        children.start("it", command)
        return children.wait()[1]


def _copy_lines(source: IO[str], target: IO[str], prefix: str) -> None:
    try:
        for line in source:
            target.write(f"{prefix}{line}" if line.strip() else line)
            target.flush()
    except BrokenPipeError:  # nobody reads any more: who writes shall learn of it, not wait for a reader
        source.close()


# loaded here: between the fork and the program of a child, where other threads may hold any lock, nothing may be loaded
_library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent dies, however that dies; without effect elsewhere."""
    if _library is not None:
        _library.prctl(1, number)  # PR_SET_PDEATHSIG
