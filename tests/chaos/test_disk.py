"""Disks that are full, folders that cannot be written, checkpoints that are damaged: named, and nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omni.checkpoint import _digest, periodic_checkpoints
from omni.summary import MEMBER, is_summary
from tests.chaos.compare import assert_same_end
from tests.chaos.conftest import Stages
from tests.chaos.fork_server import ForkServer, Outcome
from tests.chaos.kills import Plan
from tests.chaos.small_stages import STAGES

pytestmark = pytest.mark.slow


# ---- damaged checkpoints ----


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def truncate(path: Path, mark: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path: Path, mark: Path) -> None:
    """Inside of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 128 + largest.file_size // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path, mark: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(mark)))


def hide_a_pickle(path: Path, mark: Path) -> None:
    """A bomb in a checkpoint that is otherwise whole, its checksum right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("/data.pkl"))
    members[name] = pickle.dumps({"weights": Bomb(mark)}, protocol=2)
    summary = next(name for name in members if is_summary(name))
    head = json.loads(members.pop(summary))
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    head["sha256"] = _digest(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(summary, json.dumps(head))
    assert summary.endswith(MEMBER)


DAMAGES = (truncate, flip_a_byte, empty, replace_by_a_pickle, hide_a_pickle)


@pytest.mark.parametrize("letter", STAGES)
def test_damaged_checkpoints_are_passed_over(letter: str, stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    """One run, of which the newest checkpoint is damaged again and again, each time in another way."""
    script, run, mark, story = STAGES[letter], tmp_path / "run", tmp_path / "exploded", []
    config = stages.config(letter)
    for number, damage in enumerate(DAMAGES, 1):
        step = number * script.total_steps // (len(DAMAGES) + 1)
        outcome = server.run(letter, config, run, plan=Plan("after the update", step))
        assert outcome.code == -signal.SIGKILL, outcome.said
        (_, newest), (_, before) = periodic_checkpoints(run, script.kind)[:2]
        damage(newest, mark)
        story.append(f"{newest.name}: {damage.__name__}")
        outcome = server.run(letter, config, run, plan=Plan("metrics cut", -1))
        assert outcome.code == -signal.SIGKILL, outcome.said
        assert f"passing over {newest}" in outcome.said and f"resuming from {before}" in outcome.said, story
    assert server.run(letter, config, run).code == 0
    assert not mark.exists(), story
    assert_same_end(stages.whole(letter), run, script.kind, story)


def test_all_checkpoints_damaged(stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    """Nobody but the user may decide to start over."""
    run, config = tmp_path / "run", stages.config("A")
    assert server.run("A", config, run, plan=Plan("after the update", 17)).code == -signal.SIGKILL
    for _, path in periodic_checkpoints(run, "thinker"):
        truncate(path, tmp_path)
    outcome = server.run("A", config, run)
    assert outcome.code == 1 and "found 2 checkpoints and none that can be read" in outcome.said, outcome.said
    outcome = server.run("A", config, run, "--fresh")
    assert outcome.code == 0 and "set the earlier run aside" in outcome.said, outcome.said
    assert_same_end(stages.whole("A"), run, "thinker", ["all checkpoints damaged at step 16, then --fresh"])


def test_a_bomb_would_explode(tmp_path: Path) -> None:
    """What the test above leaves unharmed is dangerous to others."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


# ---- disks that are full ----


def assert_says_so(outcome: Outcome, folder: Path) -> None:
    """One line that names the place, exit code 1."""
    assert outcome.code == 1 and "Traceback" not in outcome.said, (outcome.code, outcome.said)
    assert f"error: {folder}" in outcome.said and "cannot be written" in outcome.said, outcome.said


@pytest.mark.parametrize("letter", STAGES)
def test_files_may_grow_no_further(letter: str, stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    """The limit of a file's size stands for a disk without room for one checkpoint more."""
    script, run, config = STAGES[letter], tmp_path / "run", stages.config(letter)
    whole = stages.whole(letter)
    best, final = ((whole / f"{script.kind}{end}.pt").stat().st_size for end in ("_best", ""))
    story = []
    for step, size in ((4, best // 2), (script.total_steps // 2, (best + final) // 2)):
        outcome = server.run(letter, config, run, plan=Plan("after the update", step))
        assert outcome.code == -signal.SIGKILL, outcome.said
        kept = {path: path.read_bytes() for _, path in periodic_checkpoints(run, script.kind)}
        story.append(f"files of at most {size} bytes from step {step} on")
        outcome = server.run(letter, config, run, file_size=size)
        assert_says_so(outcome, run)
        assert all(path.read_bytes() == data for path, data in kept.items()), story
        assert not list(run.rglob(".*.partial")), story
    assert server.run(letter, config, run).code == 0
    assert_same_end(whole, run, script.kind, story)


def test_metrics_may_grow_no_further(stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    run, config = tmp_path / "run", stages.config("A")
    assert server.run("A", config, run, plan=Plan("after the update", 25)).code == -signal.SIGKILL
    size = (run / "metrics.jsonl").stat().st_size
    outcome = server.run("A", config, run, file_size=size + 100, log=tmp_path / "log")
    assert server.run("A", config, run).code == 0
    assert_same_end(stages.whole("A"), run, "thinker", ["no room for metrics"])
    assert_says_so(outcome, run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, where this machine lets one be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)):
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def mount(*words: str) -> bool:
    tool = shutil.which("mount")
    return tool is not None and subprocess.run([tool, *words], capture_output=True).returncode == 0


def test_a_disk_that_is_full_and_then_larger(
    stages: Stages, server: ForkServer, small_disk: Path, tmp_path: Path
) -> None:
    run, config, log = small_disk / "run", stages.config("A"), tmp_path / "log"
    (small_disk / "ballast").write_bytes(bytes(100 << 10))
    assert_says_so(server.run("A", config, run, log=log), run)
    (small_disk / "ballast").unlink()
    assert mount("-o", "remount,size=20m", str(small_disk))
    assert server.run("A", config, run, log=log).code == 0
    assert_same_end(stages.whole("A"), run, "thinker", ["disk full"])


# ---- folders that cannot be written ----


@pytest.mark.parametrize("letter", STAGES)
def test_read_only_folder(letter: str, stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    script, run, config = STAGES[letter], tmp_path / "run", stages.config(letter)
    plan = Plan("after the update", script.total_steps // 2)
    assert server.run(letter, config, run, plan=plan).code == -signal.SIGKILL
    run.chmod(0o555)
    outcome = server.run(letter, config, run, powerless=True)
    run.chmod(0o755)
    assert_says_so(outcome, run)
    assert server.run(letter, config, run).code == 0
    assert_same_end(stages.whole(letter), run, script.kind, ["read-only for one attempt"])


@pytest.mark.parametrize("letter", STAGES)
def test_nowhere_to_begin(letter: str, stages: Stages, server: ForkServer, tmp_path: Path) -> None:
    """A folder that cannot be made."""
    (tmp_path / "closed").mkdir()
    config = stages.config(letter)
    (tmp_path / "closed").chmod(0o555)
    outcome = server.run(letter, config, tmp_path / "closed" / "run", log=tmp_path / "log", powerless=True)
    (tmp_path / "closed").chmod(0o755)
    assert_says_so(outcome, tmp_path / "closed" / "run")


def test_a_disk_that_became_read_only(stages: Stages, server: ForkServer, small_disk: Path, tmp_path: Path) -> None:
    run, config, log = small_disk / "run", stages.config("A"), tmp_path / "log"
    assert mount("-o", "remount,size=20m", str(small_disk))
    assert server.run("A", config, run, log=log, plan=Plan("after the update", 15)).code == -signal.SIGKILL
    assert mount("-o", "remount,ro", str(small_disk))
    outcome = server.run("A", config, run, log=log)
    assert mount("-o", "remount,rw", str(small_disk))
    assert_says_so(outcome, run)
    assert server.run("A", config, run, log=log).code == 0
    assert_same_end(stages.whole("A"), run, "thinker", ["read-only for one attempt"])
