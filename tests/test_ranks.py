"""Several ranks (`torchrun`) train as one does, and go through faults together; real processes, gloo, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from omni import ranks
from omni.checkpoint import read_summary
from omni.data.synthetic import synthesize
from tests.chaos.small_stages import STAGES
from tests.conftest import metrics
from tests.rank_session import do, stage_job, torchrun, toy_job, write_equal_config
from tests.test_training_loop import CONFIG, assert_same, weights

LIMIT = 400  # seconds that a torchrun may take on a machine that does other things as well


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with rows that the ranks compare, and without dropout."""
    path = tmp_path_factory.mktemp("toy") / "toy.json"
    values = {**CONFIG, "dropout": 0.0, "spread": 0.1}
    values["first"] = {**CONFIG["first"], "batch_size": 5, "optimizer": "adamw"}
    values["run"] = {**CONFIG["run"], "keep_last": 9, "rank_timeout": 120}
    path.write_text(json.dumps(values))
    return path


def pids(child: subprocess.Popen[bytes]) -> list[int]:
    """The ranks' processes, by rank."""
    found = {}
    for process in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split():
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        found.update({int(item[5:]): int(process) for item in variables if item.startswith(b"RANK=")})
    return [found[rank] for rank in sorted(found)]


def wait_for_steps(child: subprocess.Popen[bytes], run: Path, steps: int) -> None:
    deadline = time.monotonic() + LIMIT
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_text().count('"train"') >= steps):
        assert child.poll() is None and time.monotonic() < deadline, "see what the ranks said, beside the run"
        time.sleep(0.01)


class Session:
    """The same runs with one rank and with two."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, one, two = folder, folder / "one", folder / "two"
        (folder / "inputs").mkdir()
        synthesize("test", folder, processes=1)
        jobs = []
        for letter, script in STAGES.items():
            path = write_equal_config(letter, folder / "test", folder)
            assert do(stage_job(letter, path, one / letter)) == 0
            (folder / "inputs" / f"{script.kind}.pt").hardlink_to(one / letter / f"{script.kind}.pt")
            jobs.append(stage_job(letter, path, two / letter))
        assert do(toy_job(config, one / "toy")) == 0
        dropout, skip = ("--dropout", "0.3"), ("--bad_rows", "[3, 30]", "--on_bad_sample", "skip")
        skip += ("--max_bad_fraction", "0.1", "--spread", "0")
        assert do(toy_job(config, one / "bad", *skip)) == 0
        jobs += [
            toy_job(config, two / "toy"),
            toy_job(config, two / "from_one", copy=(one / "toy", "toy_step_8.pt")),
            toy_job(config, two / "dropout", *dropout),
            toy_job(config, two / "resumed", *dropout, copy=(two / "dropout", "toy_step_8.pt")),
            toy_job(config, two / "poison", "--lame", "1", "--poison", "[7, 15]"),
            toy_job(config, two / "stumble", "--lame", "1", "--stumble", "[3]", "--trip", "[6]", "--detect_anomaly"),
            toy_job(config, two / "bad", *skip),
            toy_job(config, two / "signal", "--sleep", "0.05", "--checkpoint_freq", "1000"),
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        child = torchrun(folder / "said.txt", "tests.rank_session", folder / "jobs.json")
        wait_for_steps(child, two / "signal", 3)
        os.kill(pids(child)[1], signal.SIGTERM)
        self.code, self.said = child.wait(LIMIT), (folder / "said.txt").read_text()

    def lines(self, ranks: str, name: str, event: str) -> list[dict[str, Any]]:
        return [line for line in metrics(self.folder / ranks / name) if line["event"] == event]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Session:
    return Session(tmp_path_factory.mktemp("ranks"), config)


def assert_alike(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    """The same lines, losses equal to 1e-5, gradient norms to 1e-4: Muon rounds to bf16, and later steps show it."""
    assert len(one) == len(two) > 0
    for ours, theirs in zip(one, two, strict=True):
        figures = {"loss", "grad_norm"} & ours.keys()
        found, expected = ({key: line[key] for key in figures} for line in (theirs, ours))
        for key, value in found.items():
            assert value == pytest.approx(expected[key], rel=1e-4 if key == "grad_norm" else 1e-5), ours
        rest = [{key: line[key] for key in line.keys() - figures} for line in (ours, theirs)]
        assert ours["event"] == "val" or rest[0] == rest[1]


# ---- the same training ----


@pytest.mark.parametrize("letter", STAGES)
def test_two_ranks_give_the_losses_of_one(letter: str, session: Session) -> None:
    """Every phase: CTC, contrast with the texts and voices of all ranks, codebooks; shares of 3 and 2 samples."""
    for event in ("train", "val"):
        assert_alike(session.lines("one", letter, event), session.lines("two", letter, event))
    kind = STAGES[letter].kind
    one, two = (weights(session.folder / ranks / letter, f"{kind}.pt") for ranks in ("one", "two"))
    if letter == "D":  # the codebooks of both ranks are those of one
        name = "codec.quantizer.codebooks_KVD"
        assert torch.allclose(one[name], two[name], atol=1e-5)


def test_rank_0_alone_speaks(session: Session) -> None:
    assert session.said.count("saved ") == len(STAGES) + 7
    assert "fp32 on 2 ranks (cpu)" in session.said and session.said.count("job 11\n") == 1


def test_the_toy_and_its_data_order(session: Session) -> None:
    assert_alike(session.lines("one", "toy", "train"), session.lines("two", "toy", "train"))
    assert_alike(session.lines("one", "toy", "val"), session.lines("two", "toy", "val"))


def test_a_run_of_one_rank_goes_on_with_two(session: Session) -> None:
    assert_alike(session.lines("one", "toy", "train"), session.lines("two", "from_one", "train"))


def test_a_run_of_two_ranks_goes_on_with_one(session: Session, config: Path, tmp_path: Path) -> None:
    assert do(toy_job(config, tmp_path / "run", copy=(session.folder / "two" / "toy", "toy_step_8.pt"))) == 0
    assert_alike(session.lines("one", "toy", "train"), [m for m in metrics(tmp_path / "run") if m["event"] == "train"])


def test_two_ranks_resume_bit_for_bit(session: Session) -> None:
    """With dropout, of which each rank has random numbers of its own."""
    assert_same(session.folder / "two" / "dropout", session.folder / "two" / "resumed")


# ---- guards ----


def test_nan_on_one_rank_skips_the_step_on_all(session: Session) -> None:
    skips = session.lines("two", "poison", "skip")
    assert [(line["phase"], line["step"]) for line in skips] == [("first", 4), ("first", 8)]
    assert all(len(line["rows"]) == 10 for line in skips)  # of both ranks, both micro-batches
    assert all(torch.isfinite(value).all() for value in weights(session.folder / "two" / "poison").values())


def test_a_rank_that_stops_in_a_step_holds_nobody_up(session: Session) -> None:
    """While the other one is waiting for its rows, in the forward pass and in the backward pass."""
    skips = session.lines("two", "stumble", "skip")
    assert [line["step"] for line in skips] == [2, 4]
    assert skips[0]["why"].startswith("rank 1: the toy stumbles;")
    assert skips[1]["why"].startswith("rank 1: the toy trips;")
    assert read_summary(session.folder / "two" / "stumble" / "toy.pt")["total_step"] == 18


def test_bad_samples_are_left_out_and_counted_by_all(session: Session) -> None:
    one, two = session.lines("one", "bad", "train"), session.lines("two", "bad", "train")
    assert_alike(one, two)
    assert two[11]["bad_samples"] == 2


# ---- the end of a run ----


def test_a_signal_to_one_rank_saves_and_ends_all(session: Session, config: Path) -> None:
    """The last job of the session. One rank goes on, with the data in the same order."""
    run = session.folder / "two" / "signal"
    assert session.code != 0 and session.said.count("stopped by signal 15 after saving") == 1, session.said
    (saved,) = run.glob("toy_step_*.pt")
    assert 3 <= read_summary(saved)["total_step"] < 18 and not (run / "toy.pt").exists()
    assert do(toy_job(config, run)) == 0
    assert_alike(session.lines("one", "toy", "train"), session.lines("two", "signal", "train"))


def start(config: Path, run: Path, *words: str) -> subprocess.Popen[bytes]:
    run.parent.mkdir(exist_ok=True)
    return torchrun(run.with_suffix(".txt"), "tests.toy", "--config", config, "--save_dir", run, *words)


def ended(child: subprocess.Popen[bytes], run: Path) -> tuple[int, str]:
    """Exit code, and what was said."""
    return child.wait(LIMIT), run.with_suffix(".txt").read_text()


@pytest.mark.slow
def test_a_mistake_on_one_rank_ends_all_with_one_message(config: Path, tmp_path: Path) -> None:
    """Long before the two minutes of ``rank_timeout``."""
    run = tmp_path / "run"
    started = time.monotonic()
    code, said = ended(start(config, run, "--lame", "1", "--blunder", "[11]"), run)
    assert code == 1 and said.count("RuntimeError: a mistake of ours") == 1 and "error: " not in said, said
    assert (run / "toy_step_4.pt").exists() and not (run / "toy.pt").exists()
    assert time.monotonic() - started < 110


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_the_same_command_continues(rank: int, config: Path, tmp_path: Path) -> None:
    run, words = tmp_path / "run", ("--dropout", "0.3")
    child = start(config, run, *words, "--sleep", "0.1")
    wait_for_steps(child, run, 6)
    os.kill(pids(child)[rank], signal.SIGKILL)
    _, said = ended(child, run)
    assert said.count("error: ") == 1 and "has lost another rank" in said and "RuntimeError" not in said, said
    for save_dir in (run, tmp_path / "whole"):
        assert ended(start(config, save_dir, *words), save_dir)[0] == 0
    assert_same(tmp_path / "whole", run)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves(sent: signal.Signals, config: Path, tmp_path: Path) -> None:
    """torchrun passes it on to every rank."""
    run, words = tmp_path / "run", ("--dropout", "0.3")
    child = start(config, run, *words, "--sleep", "0.1", "--checkpoint_freq", "1000")
    wait_for_steps(child, run, 3)
    child.send_signal(sent)
    _, said = ended(child, run)
    assert said.count(f"stopped by signal {int(sent)} after saving") == 1, said
    for save_dir in (run, tmp_path / "whole"):
        assert ended(start(config, save_dir, *words), save_dir)[0] == 0
    assert_same(tmp_path / "whole", run)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_waited_for_only_so_long(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(config, run, "--sleep", "0.1", "--rank_timeout", "30")
    wait_for_steps(child, run, 3)
    stopped = pids(child)[1]
    os.kill(stopped, signal.SIGSTOP)
    _, said = ended(child, run)
    assert "did not answer within 30 s" in said, said
    assert not Path(f"/proc/{stopped}").exists()


@pytest.mark.slow
def test_mistakes_of_the_user_are_one_line(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for words, expected in (
        (
            ("--first.batch_size", "1"),
            "error: batch_size: found 1 (of 37 samples), expected at least one sample for",
        ),
        (("--bad_rows", "[30]"), "error: toy.csv:32: truncated"),
        (("--second.monitor", "wer"), "monitor: found 'wer'"),
        (("--widht", "3"), "did you mean --width?"),
    ):
        code, said = ended(start(config, run, *words), run)
        assert code == 1 and said.count("error: ") == 1 and expected in said, said


# ---- one process ----


def test_one_process_has_no_process_group(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "rendezvous", "all_reduce", "all_gather_object", "broadcast"):
        monkeypatch.delattr(torch.distributed, name)
    assert not ranks.launched() and (ranks.rank(), ranks.size(), ranks.local()) == (0, 1, (0, 1))
    assert do(toy_job(config, tmp_path / "run")) == 0
    assert not torch.distributed.is_initialized()


def test_shares_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(range(11))
    shares = []
    for number in range(4):
        monkeypatch.setattr(ranks, "_team", ranks._Team(number, 4, None, 1.0))
        shares.append(ranks.share(rows))
        for limit in range(12):
            assert ranks.rows_before(limit, len(shares[-1])) == sum(row < limit for row in shares[-1])
    assert [len(share) for share in shares] == [3, 3, 3, 2] and ranks.merged(shares) == rows
    with ranks.alone():
        assert ranks.share(rows) == rows and ranks.rows_before(5, 11) == 5
