"""Processes side by side: exit codes, signals, whose line is whose; and the order in which a run does its steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni.processes import Children, run_process
from omni.run import RunFolder, Step, Work
from tests.conftest import ROOT


def test_exit_codes_are_passed_on() -> None:
    assert run_process([sys.executable, "-c", "import sys; sys.exit(7)"]) == 7
    assert run_process([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_child_is_told_once(sent: int, tmp_path: Path) -> None:
    """However the signal comes - to this process, or by Ctrl-C to its whole group - the child gets one."""
    child = f"""
import signal, sys, time
got = []
signal.signal({int(sent)}, lambda *_: got.append(1))
open({str(tmp_path / "ready")!r}, "w").close()
while not got: time.sleep(0.01)
time.sleep(0.5)
sys.exit(100 + len(got))
"""
    code = (
        f"import sys; from omni.processes import run_process; sys.exit(run_process([sys.executable, '-c', {child!r}]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while not (tmp_path / "ready").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    os.killpg(parent.pid, sent)
    assert parent.wait(120) == 101


def test_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells a child of its parent's death")
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(200)"
    code = (
        f"import sys; from omni.processes import run_process; sys.exit(run_process([sys.executable, '-c', {child!r}]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    stat = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    deadline = time.monotonic() + 60
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_that_comes_while_a_child_is_started_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(subprocess.Popen[str]):
        def __init__(self, *words: object, **settings: object) -> None:
            super().__init__(*words, **settings)  # type: ignore[call-overload]
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with Children() as children:
        children.start("it", [sys.executable, "-c", "import time; time.sleep(60)"])
        assert children.wait() == ("it", 128 + signal.SIGTERM)
        assert children.told == [signal.SIGTERM]


def test_who_writes_to_nobody_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Children() as children, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        children.start("it", [sys.executable, "-c", "while True: print('more')"], "A | ")
        assert children.wait()[1] != 0


# ---- the steps of a run ----


def step(name: str, code: str, *needs: str, divisible: bool = False) -> Step:
    command = [sys.executable, "-c", code]
    return Step(name, f"step {name}", lambda: False, needs=needs, command=command, letter=name, divisible=divisible)


def work_off(tmp_path: Path, steps: list[Step], jobs: int) -> tuple[int, RunFolder]:
    folder = RunFolder(tmp_path)
    with Children() as children:
        return Work(steps, folder, children, jobs).to_the_end(), folder


def meet(tmp_path: Path, own: str, other: str) -> str:
    """Code that ends when another process runs at the same time."""
    return f"""
import pathlib, sys, time
here = pathlib.Path({str(tmp_path)!r})
(here / {own!r}).touch()
until = time.monotonic() + 60
while not (here / {other!r}).exists():
    if time.monotonic() > until: sys.exit(3)
    time.sleep(0.01)
print('met', *sys.argv[1:])
"""


def test_steps_that_do_not_need_each_other_run_side_by_side(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni.run.usable_cores", lambda: 4)
    steps = [
        step("0", "print('first')"),
        step("A", meet(tmp_path, "a", "b"), "0", divisible=True),
        step("B", meet(tmp_path, "b", "a"), "0"),
        step("C", "import sys; print('last', *sys.argv[1:])", "A", "B", divisible=True),
    ]
    code, folder = work_off(tmp_path, steps, jobs=2)
    said = capfd.readouterr().out.splitlines()
    assert code == 0
    # who runs alone writes as it is and has all cores; the others get their part, and each line says whose it is
    assert {"first", "A | met --num_threads 2", "B | met", "last"} <= set(said)
    assert list(folder.steps) == ["0", *sorted(("A", "B"), key=list(folder.steps).index), "C"]


def test_one_job_at_a_time_if_so_wanted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [step(name, f"print('{name} begins'); print('{name} ends')", divisible=True) for name in "AB"]
    assert work_off(tmp_path, steps, jobs=1)[0] == 0
    said = capfd.readouterr().out.splitlines()
    assert [line for line in said if line.endswith((" begins", " ends"))] == [
        "A begins",
        "A ends",
        "B begins",
        "B ends",
    ]
    assert not any("num_threads" in line for line in said)


def test_a_step_that_fails_stops_the_others_which_save(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saves = f"""
import pathlib, time
here = pathlib.Path({str(tmp_path)!r})
try:
    (here / 'ready').touch()
    time.sleep(60)
except KeyboardInterrupt:
    (here / 'saved').touch()
    raise SystemExit(130)
"""
    fails = f"""
import pathlib, sys, time
while not pathlib.Path({str(tmp_path / "ready")!r}).exists(): time.sleep(0.01)
time.sleep(0.1)
sys.exit('error: no such file')
"""
    began = time.monotonic()
    code, folder = work_off(tmp_path, [step("A", saves), step("B", fails), step("C", "", "A")], jobs=2)
    said = capfd.readouterr()
    assert code == 1 and time.monotonic() - began < 30
    assert (tmp_path / "saved").exists() and not folder.steps
    assert "B | error: no such file" in said.err and "step B: stopped with exit code 1" in said.out


def test_time_that_two_steps_share_counts_once(tmp_path: Path) -> None:
    steps = {"a": (0.0, 10.0), "b": (0.0, 6.0), "c": (10.0, 14.0), "d": (12.0, 13.0)}
    noted = {name: {"made_from": {}, "seconds": end - start, "ended": end} for name, (start, end) in steps.items()}
    assert RunFolder(tmp_path, noted).wall_seconds() == 14.0
