"""Real processes: the script as a person runs it, the workers of a killed run, signals that all of them get."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.compare import assert_same_end
from tests.chaos.conftest import Stages
from tests.chaos.fork_server import ForkServer
from tests.chaos.kills import Plan
from tests.conftest import ROOT, command

pytestmark = pytest.mark.slow


def test_the_script_itself(stages: Stages, tmp_path: Path) -> None:
    """Nothing here comes from the fork server but the run to compare with."""
    run, script, config = tmp_path / "run", ROOT / "train_text.py", stages.config("A")
    words = [str(script), "--config", str(config), "--save_dir", str(run)]
    for lines in (4, 21):
        child = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= lines:
                break
            time.sleep(0.002)
        child.kill()
        assert child.wait(timeout=60) == -signal.SIGKILL
    assert not (run / "thinker.pt").exists()
    done = command(*words)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stdout + done.stderr
    assert_same_end(stages.whole("A"), run, "thinker", ["killed twice"])


def test_a_killed_run_leaves_its_folder_free(stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    """Its workers notice after seconds that it is gone; the same command must not wait for them."""
    run, words = tmp_path / "run", ("--num_workers", "2")
    outcome = server.run("A", stages.config("A"), run, *words, plan=Plan("after the update", 5), orphans=True)
    assert outcome.code == -signal.SIGKILL, outcome.said
    outcome = server.run("A", stages.config("A"), run, *words)
    assert outcome.code == 0, outcome.said
    assert_same_end(stages.whole("A"), run, "thinker", ["killed, its workers alive"])


@pytest.mark.parametrize(
    ("sent", "workers"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGINT, 0),
        (signal.SIGINT, 2),
        (signal.SIGTERM, 2),
    ],
)
def test_a_signal_to_all_processes(
    sent: signal.Signals, workers: int, stages: Stages, server: ForkServer, tmp_path: Path
) -> None:
    """Ctrl-C reaches a whole process group; so does the SIGTERM of a batch system."""
    run, config, words = tmp_path / "run", stages.config("A"), ("--num_workers", str(workers))
    outcome = server.run("A", config, run, *words, send=int(sent), at_step=13)
    assert outcome.code == 128 + sent, outcome.said
    assert "the same command continues" in outcome.said and "Traceback" not in outcome.said, outcome.said
    assert (run / "thinker_step_14.pt").exists()
    assert server.run("A", config, run, *words).code == 0
    assert_same_end(stages.whole("A"), run, "thinker", [f"{sent.name} to all"])


def test_half_a_checkpoint_does_not_stay(stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    """Told to stop at a step that saves nothing otherwise, then killed while saving it."""
    run, config, plan = tmp_path / "run", stages.config("A"), Plan("half a checkpoint", 12)
    outcome = server.run("A", config, run, plan=plan, send=int(signal.SIGTERM), at_step=12)
    assert outcome.code == -signal.SIGKILL and (run / ".thinker_step_13.pt.partial").exists(), outcome.said
    assert server.run("A", config, run).code == 0
    assert_same_end(stages.whole("A"), run, "thinker", ["SIGTERM, killed while saving"])
    assert not list(run.rglob("*.partial"))
