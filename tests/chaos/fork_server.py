"""Runs stages in children of one process that has imported torch once, and kills them.

The server computes nothing and starts no thread, so a forked child begins like a new process, seconds earlier. It reads
a request and writes an outcome, each a line of JSON. ``python -m tests.chaos.fork_server`` is started by
:class:`ForkServer`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.kills import DELAY, Plan, install, send_at
from tests.chaos.small_stages import STAGES
from tests.conftest import ROOT

LIMIT = 120  # seconds that an attempt may take


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: exit code, or minus the signal's number; what it was killed at; what it said."""

    code: int
    killed_at: str
    said: str


class ForkServer:
    """The other side: starts the server and asks it."""

    def __init__(self) -> None:
        self._rubbish = tempfile.TemporaryDirectory()  # killed workers leave their sockets behind
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.fork_server"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": self._rubbish.name},
        )  # fmt: skip

    def run(self, letter: str, config: Path, save_dir: Path, *words: str, **keys: Any) -> Outcome:
        """One attempt of a stage.

        Args:
            letter: A to E.
            config: its configuration.
            save_dir: where it writes.
            words: more of the command line.
            keys: ``log`` (a file for what it says; by default beside ``save_dir``), ``plan`` (a :class:`Plan`),
                ``file_size`` (most bytes of a file), ``powerless`` (without root's right to write everywhere),
                ``orphans`` (leave the killed run's workers alone), ``send`` (a signal to all its processes) at
                ``at_step``.
        """
        log = keys.pop("log", save_dir.with_name(save_dir.name + ".log"))
        plan = keys.pop("plan", None)
        request = {"letter": letter, "words": ["--config", str(config), "--save_dir", str(save_dir), *words],
                   "log": str(log), "plan": plan and plan.to_dict(), **keys}  # fmt: skip
        assert self._process.stdin and self._process.stdout
        start = log.stat().st_size if log.exists() else 0
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return Outcome(answer["code"], answer["killed_at"], log.read_bytes()[start:].decode())

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._rubbish.cleanup()


def _serve() -> None:
    # every optimizer imports torch._dynamo, which takes longer than a small run
    for name in ("torch._dynamo", *(script.module for script in STAGES.values())):
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lose the server's threads"
    for line in sys.stdin:
        print(json.dumps(_attempt(json.loads(line))), flush=True)


def _attempt(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a child, kill it when it is time, and wait until nothing is left of it."""
    plan = Plan(**request["plan"]) if request["plan"] else None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(request, plan, writing)
    os.close(writing)
    said = b""
    if plan and plan.moment == DELAY:
        said = os.read(reading, 100)
        time.sleep(plan.delay)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not request.get("orphans"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # its workers, which would leave by themselves in five seconds
        while more := os.read(reading, 100):  # ends when every process that holds the other end has
            said += more
    os.close(reading)
    name = said.decode().splitlines()[-1] if said else ""
    return {"code": code, "killed_at": DELAY if name == "armed" else name}


def _run(request: dict[str, Any], plan: Plan | None, pipe: int) -> None:
    """The child: a stage script's last line, with the disturbance that was asked for."""
    code = 99
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.alarm(LIMIT)
        if request.get("file_size"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
        if request.get("powerless"):
            _give_up_capabilities()
        if plan:
            install(plan, pipe)
        if request.get("send"):
            send_at(request["at_step"], request["send"])
        from omni.training_utils import run_stage

        script = STAGES[request["letter"]]
        module = importlib.import_module(script.module)
        code = run_stage(getattr(module, script.config_class), module.build, request["words"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 99
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _give_up_capabilities() -> None:
    """Root without its capabilities is bound by the permissions of files, like everybody."""
    version_3, everything = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    data = (ctypes.c_uint32 * 6)(*[everything] * 6)
    assert ctypes.CDLL(None, use_errno=True).capset(header, data) == 0, ctypes.get_errno()


if __name__ == "__main__":
    _serve()
