"""What a run says while it trains: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import termios
from pathlib import Path

from tests.forked import Child, start_module
from tests.test_training_loop import CONFIG


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
