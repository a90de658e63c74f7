"""What a run says while it trains: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import RunStage, metrics
from tests.forked import Child, start_module
from tests.test_training_loop import CONFIG
from tests.toy import ToyConfig, build


def test_a_log_file_gets_plain_lines_and_a_terminal_a_bar(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(CONFIG))

    def start(name: str, log: Path) -> Child:
        words = ("--config", tmp_path / "toy.json", "--save_dir", tmp_path / name)
        return start_module("tests.toy", *words, log=log, environment={"TERM": "xterm"})

    code = start("a", tmp_path / "log.txt").wait()
    said = (tmp_path / "log.txt").read_bytes()
    assert code == 0 and b"\r" not in said and b"\x1b" not in said and b"\b" not in said
    lines = said.decode().splitlines()
    assert sum(bool(re.match(r"step \d+/12 \| loss [\d.]+ \| lr ", line)) for line in lines) == 12
    assert sum(bool(re.match(r"step \d+/\d+ \| validation: loss", line)) for line in lines) == 5
    assert all(re.search(r"\| \d+:\d\d left$", line) for line in lines if line.startswith("step "))
    assert max(map(len, lines)) < 200

    # the same run on a terminal rewrites one line: what the log must not hold
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    child, shown = start("b", Path(os.ttyname(theirs))), b""
    while child.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            shown += os.read(ours, 1 << 16)
    os.close(theirs)
    os.close(ours)
    assert child.wait() == 0
    assert shown.replace(b"\r\n", b"").count(b"\r") > 12 and b"12/12" in shown and b"grad" in shown


class Runs:
    """Stands for the package wandb: what was begun, and what each run was told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.told: dict[str, dict[int, dict[str, float]]] = {}

    def init(self, **given: Any) -> SimpleNamespace:
        """Begin or continue a run."""
        self.begun.append(given)
        told = self.told.setdefault(given["id"], {})
        return SimpleNamespace(log=lambda figures, step: told.setdefault(step, {}).update(figures), finish=lambda: None)


def test_weights_and_biases_gets_the_curves_under_one_id(
    tmp_path: Path, run_here: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(CONFIG))
    words, runs = ("--config", tmp_path / "toy.json", "--save_dir", tmp_path / "a", "--wandb"), Runs()
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    done = run_here(ToyConfig, build, *words)
    assert done.returncode == 1 and "wandb: found true, but the package is not installed" in done.stderr
    monkeypatch.setitem(sys.modules, "wandb", runs)
    assert run_here(ToyConfig, build, *words).returncode == 0
    (tmp_path / "a" / "toy.pt").unlink()  # the last phase is done again, from its last checkpoint
    assert run_here(ToyConfig, build, *words).returncode == 0
    assert [given["id"].split("-")[1] for given in runs.begun] == ["first", "second", "second"]
    assert len(runs.told) == 2 and all(given["resume"] == "allow" for given in runs.begun)
    for record in metrics(tmp_path / "a"):
        if record["event"] in ("train", "val"):
            told = next(told for name, told in runs.told.items() if name.endswith(record["phase"]))
            assert told[record["step"]][f"{record['event']}/loss"] == record["loss"]

    def refuse(**given: Any) -> None:
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(runs, "init", refuse)
    done = run_here(ToyConfig, build, *words[:-2], tmp_path / "b", "--wandb")
    assert done.returncode == 1 and "could not begin (no network); `wandb login`" in done.stderr
