"""What the loop does when something is wrong: bad samples, NaN, a full disk, damaged checkpoints, other code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from omni import checkpoint, save_folder
from omni.checkpoint import read_summary
from tests.conftest import metrics
from tests.test_training_loop import CONFIG, assert_same, start, train, wait_for_steps, weights


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(CONFIG))
    return path


# ---- samples that cannot be used ----


def test_a_bad_sample_stops_the_run_and_nothing_is_lost(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(config, run, "--bad_rows", "[30]", "--checkpoint_freq", "1000") == 1
    said = capsys.readouterr().err
    assert "error: toy.csv:32: truncated, expected a whole row" in said and "--on_bad_sample skip" in said
    (saved,) = run.glob("toy_step_*.pt")  # what was trained until then
    assert f"The last good checkpoint is {saved}" in said
    # the row is whole again: the end is that of a run in which it always was
    assert train(config, run) == train(config, tmp_path / "whole") == 0
    assert_same(tmp_path / "whole", run)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_counted(workers: int, config: Path, tmp_path: Path) -> None:
    words = ("--bad_rows", "[3, 30]", "--on_bad_sample", "skip", "--max_bad_fraction", "0.1")
    assert train(config, tmp_path / "one", *words, "--num_workers", str(workers)) == 0
    assert train(config, tmp_path / "two", *words) == 0
    assert_same(tmp_path / "one", tmp_path / "two")
    counts = [line["bad_samples"] for line in metrics(tmp_path / "one") if line["event"] == "train"]
    assert counts[11] == 2  # of the first phase, whose 24 batches hold every row


def test_a_run_may_go_on_when_its_data_have_turned_bad(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is gone changes the lineage; who leaves bad samples out need not start over."""
    run = tmp_path / "run"
    assert train(config, run, "--first.max_steps", "8", "--second.max_steps", "2") == 0
    words = ("--data_name", "b", "--second.max_steps", "6")
    assert train(config, run, *words) == 1
    assert "--on_bad_sample skip goes on without them" in capsys.readouterr().err
    assert train(config, run, *words, "--on_bad_sample", "skip") == 0
    assert 'the data have changed, and their order with them: data: "a" -> "b"' in capsys.readouterr().out


def test_another_seed_is_refused_and_nothing_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(config, run) == 0
    before = (run / "config.json").read_bytes()
    assert train(config, run, "--seed", "1") == 1
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert train(config, run, "--print_freq", "7") == 0  # complete: nothing to do, and nothing is written
    assert (run / "config.json").read_bytes() == before


def test_nothing_usable_at_all_ends_the_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--bad_rows", json.dumps(list(range(37))), "--on_bad_sample", "skip", "--max_bad_fraction", "1")
    assert train(config, tmp_path / "run", *words) == 1
    assert "37 of 37 samples cannot be used" in capsys.readouterr().err


def test_a_window_of_skipped_steps_has_no_loss(config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "run", "--poison", "[7]") == 0
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert losses[3] is None and losses[2] > 0 and losses[4] > 0


def test_too_many_bad_samples_end_the_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--bad_rows", "[3, 30]", "--on_bad_sample", "skip", "--max_bad_fraction", "0.03")
    assert train(config, tmp_path / "run", *words) == 1
    said = capsys.readouterr()
    assert said.out.count("left out: truncated") == 2
    assert "2 of 37 samples cannot be used" in said.err and "max_bad_fraction" in said.err


def test_a_batch_without_any_usable_sample_is_passed_over(config: Path, tmp_path: Path) -> None:
    rows = json.dumps(list(range(0, 37, 2)))
    words = ("--bad_rows", rows, "--on_bad_sample", "skip", "--max_bad_fraction", "1", "--batch_size", "1")
    assert train(config, tmp_path / "run", *words) == 0
    assert read_summary(tmp_path / "run" / "toy.pt")["total_step"] == 18


# ---- numbers that are not finite ----


@pytest.mark.parametrize(
    ("burst", "expected"),
    [
        ("layers.1", "first in the output of layers.1 (Tanh): NaN"),
        ("layers.0 backward", "first in the gradient of the output of layers.0 (Linear): NaN"),
        ("layers.1 backward", "first in the gradient of the output of layers.1 (Tanh): NaN"),
    ],
)
def test_the_first_module_that_is_not_finite_is_named(burst: str, expected: str, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config, run, "--burst", burst, "--detect_anomaly", "--second.max_steps", "1") == 0
    skips = [line for line in metrics(run) if line["event"] == "skip"]
    assert [(line["phase"], line["step"]) for line in skips] == [("first", 2)]
    assert expected in skips[0]["why"]


def test_watching_changes_nothing(config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "watched", "--detect_anomaly", "true") == train(config, tmp_path / "not") == 0
    assert_same(tmp_path / "not", tmp_path / "watched")


def test_a_skipped_batch_is_named_by_its_rows(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(config, run, "--poison", "[7]") == 0
    (skip,) = [line for line in metrics(run) if line["event"] == "skip"]
    assert (skip["epoch"], skip["batch"], len(skip["rows"])) == (0, 6, 8)  # two micro-batches of four
    assert all(row.startswith("toy.csv:") for row in skip["rows"])
    assert skip["rows"][0] in capsys.readouterr().out


def test_a_stopped_run_names_rows_and_checkpoint(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ("--poison", json.dumps(list(range(11, 40))), "--max_consecutive_skips", "3")
    assert train(config, run, *words) == 1
    said = capsys.readouterr().err
    assert f"The last good checkpoint is {run / 'toy_step_4.pt'}" in said and "rows toy.csv:" in said


def test_nan_is_never_the_best(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, values = torch.Tensor.__float__, iter([float("nan")])
    monkeypatch.setattr("tests.toy.float", lambda value: next(values, None) or real(value), raising=False)
    assert train(config, tmp_path / "run", "--second.max_steps", "1") == 0
    validations = [line["loss"] for line in metrics(tmp_path / "run") if line["event"] == "val"]
    assert validations[0] is None and validations[1] > 0
    assert (tmp_path / "run" / "toy_best.pt").exists()


# ---- checkpoints ----


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_free_space_is_checked_before_writing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    second = run / "toy_step_8.pt"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 2**19 if second.exists() else 2**40))
    assert train(config, run) == 1
    said = capsys.readouterr().err
    assert "No space left on device: 1 MiB are needed" in said and said.count("error: ") == 1
    assert f"The last good checkpoint is {second}: the same command goes on from there" in said
    monkeypatch.undo()
    assert train(config, run) == train(config, tmp_path / "whole") == 0
    assert_same(tmp_path / "whole", run)


def test_a_full_disk_for_metrics_is_one_sentence(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert train(config, tmp_path / "run") == 1
        said = capsys.readouterr().err
        assert "notes.txt: cannot be written (No space left on device). No checkpoint has been written yet" in said
        patch.setattr(save_folder.SaveFolder, "begin", lambda *_: None)
        assert train(config, tmp_path / "run") == 1
        assert "metrics.jsonl: cannot be written (No space left on device)" in capsys.readouterr().err


def test_without_any_whole_checkpoint_nothing_is_overwritten(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(config, run) == 0
    for path in run.glob("toy*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in run.glob("*.*")}
    assert train(config, run) == 1
    said = capsys.readouterr()
    assert said.out.count("passing over") == 3 and "found 3 checkpoints and none that can be read" in said.err
    assert before == {path.name: path.read_bytes() for path in run.glob("*.*")}
    assert train(config, run, fresh=True) == 0 and list(tmp_path.glob("run.before-*"))


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), MemoryError(), OSError(errno.EIO, "disk")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(
    error: Exception, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(config, run) == 0

    def fail(path: Path) -> str:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_digest", fail)
        assert train(config, run, "--second.max_steps", "8") == 1
    assert "cannot be read now" in capsys.readouterr().err
    assert not list(run.glob("*.damaged"))
    assert train(config, run, "--second.max_steps", "8") == 0


def test_an_error_inside_of_a_worker_keeps_its_traceback(config: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train(config, tmp_path / "run", "--num_workers", "1", "--broken_batch", "true")


def test_what_a_killed_run_had_begun_to_write_is_removed(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".toy_step_3.pt.partial").write_bytes(b"half")
    assert train(config, run) == 0
    assert not list(run.glob(".*partial"))


def test_other_code_is_reported(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(config, run) == 0
    code = read_summary(run / "toy.pt")["code"]
    assert code.keys() == {"version", "commit", "source"} and len(code["source"]) == 16
    monkeypatch.setattr(save_folder, "code_version", lambda: {**code, "source": "x"})
    assert train(config, run, "--second.max_steps", "8") == 0
    assert "was written by other code" in capsys.readouterr().out


def test_workers_of_a_killed_run_do_not_hold_its_folder(config: Path, tmp_path: Path) -> None:
    """Forked processes share what their parent had open; the lock must not be among it."""
    run = tmp_path / "run"
    child = start(config, run, "--sleep", "0.05", "--num_workers", "2")
    wait_for_steps(child, run, 3)
    child.kill()
    child.wait(60)
    assert train(config, run, "--num_workers", "2") == 0


def test_a_signal_to_the_whole_group_is_the_trainers_to_answer(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(config, run, "--sleep", "0.05", "--num_workers", "2", "--checkpoint_freq", "1000", group=True)
    wait_for_steps(child, run, 3)
    os.killpg(child.pid, signal.SIGTERM)
    started = time.monotonic()
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 143, said
    assert "the same command continues" in said and "Traceback" not in said
    assert time.monotonic() - started < 15
    assert list(run.glob("toy_step_*.pt"))


def test_a_killed_worker_is_one_sentence(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(config, run, "--sleep", "0.2", "--num_workers", "2")
    wait_for_steps(child, run, 6)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    # multiprocessing's tracker of shared memory is a child too
    workers = [pid for pid in children if b"tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 1 and "Traceback" not in said
    assert "error: a process that prepares batches was killed" in said and "The last good checkpoint" in said, said
    assert train(config, run) == train(config, tmp_path / "whole") == 0
    assert_same(tmp_path / "whole", run)


def test_best_and_final_survive_pruning(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config, run, "--keep_last", "1", "--checkpoint_freq", "1") == 0
    names = sorted(path.name for path in run.glob("toy*.pt"))
    assert names == ["toy.pt", "toy_best.pt", "toy_step_17.pt"]
    assert weights(run, "toy_best.pt").keys() == weights(run).keys()
    assert checkpoint.periodic_checkpoints(run, "toy")[0][0] == 17
