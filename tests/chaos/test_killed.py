"""A run that is killed again and again ends exactly as one that nothing disturbed."""

from __future__ import annotations

import collections
import random
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.compare import assert_same_end
from tests.chaos.conftest import Stages
from tests.chaos.fork_server import ForkServer
from tests.chaos.kills import Plan, plans
from tests.chaos.small_stages import STAGES

pytestmark = pytest.mark.slow
LEAST = 20  # kills


@pytest.mark.parametrize("letter", STAGES)
def test_workers_change_nothing(letter: str, stages: Stages) -> None:
    assert_same_end(stages.whole(letter), stages.whole(letter, 2), STAGES[letter].kind, ["2 workers"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("letter", STAGES)
def test_killed_twenty_times(letter: str, workers: int, stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    script, whole, started = STAGES[letter], stages.whole(letter), time.perf_counter()
    story = []
    for plan in plans(random.Random(f"{letter}{workers}"), len(script.phases), script.steps):
        outcome = server.run(letter, stages.config(letter), tmp_path / "run", "--num_workers", str(workers), plan=plan)
        if outcome.code == 0:  # it was faster than a late plan
            continue
        assert outcome.code == -signal.SIGKILL, f"{plan}: left with {outcome.code}:\n{outcome.said}\nafter {story}"
        story.append(outcome.killed_at + (f" (for: {plan.moment})" if outcome.killed_at == "step" else ""))
    outcome = server.run(letter, stages.config(letter), tmp_path / "run", "--num_workers", str(workers))
    assert outcome.code == 0, f"{outcome.said}\nafter {story}"
    counted = ", ".join(f"{count} x {name}" for name, count in sorted(collections.Counter(story).items()))
    print(f"\n{letter}, {workers} workers: {len(story)} kills in {time.perf_counter() - started:.1f} s: {counted}")
    assert len(story) >= LEAST
    assert_same_end(whole, tmp_path / "run", script.kind, story)


@pytest.mark.parametrize("letter", STAGES)
def test_workers_may_change_between_attempts(letter: str, stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    total, story = STAGES[letter].total_steps, []
    for workers, last_step in ((0, total // 3), (2, 2 * total // 3), (0, total)):
        plan = Plan("after the update", last_step, 1)
        outcome = server.run(letter, stages.config(letter), tmp_path / "run", "--num_workers", str(workers), plan=plan)
        story.append(f"{workers} workers, killed: {outcome.killed_at or 'never'}")
        assert outcome.code == (0 if last_step == total else -signal.SIGKILL), outcome.said
    assert_same_end(stages.whole(letter), tmp_path / "run", STAGES[letter].kind, story)
