"""The shared loop keeps its promises (docs/training.md lists them)."""

from __future__ import annotations

import itertools
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from omni.checkpoint import load_checkpoint, read_summary
from omni.config import UserError, load_config
from omni.optim import lr_ratio
from omni.runtime import Precision, seed_everything
from omni.training_utils import (
    Loop,
    check_gradient_explosion,
    clip_gradients,
    get_lr_scheduler,
    run_stage,
    validate_loss,
)
from tests.conftest import metrics
from tests.forked import Child, start_module
from tests.toy import Data, Toy, ToyConfig, build, error_sum

CONFIG: dict[str, Any] = {
    "name": "toy",
    "first": {"max_steps": 12, "batch_size": 4, "lr": 0.05, "warmup_steps": 2, "gradient_accumulation_steps": 2,
              "optimizer": "muon"},
    "second": {"max_steps": 6, "batch_size": 4, "lr": 0.05, "warmup_steps": 2},
    "run": {"val_freq": 5, "checkpoint_freq": 4, "print_freq": 1, "tensorboard": False, "use_amp": False,
            "num_threads": 1},
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(CONFIG))
    return path


def train(config: Path, save_dir: Path, *words: str, fresh: bool = False) -> int:
    more = ["--fresh"] if fresh else []
    return run_stage(ToyConfig, build, ["--config", str(config), "--save_dir", str(save_dir), *words, *more])


def start(config: Path, save_dir: Path, *words: str, group: bool = False) -> Child:
    words = ("--config", str(config), "--save_dir", str(save_dir), *words)
    return start_module("tests.toy", *words, log=save_dir.with_suffix(".log"), group=group)


def weights(save_dir: Path, name: str = "toy.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(save_dir / name)[0]["weights"]


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics(one) == metrics(other)


@pytest.fixture
def whole(config: Path, tmp_path: Path) -> Path:
    """A run that nothing disturbed."""
    assert train(config, tmp_path / "whole") == 0
    return tmp_path / "whole"


# ---- resume ----


def test_two_phases_train_and_leave_everything(whole: Path) -> None:
    summary = read_summary(whole / "toy.pt")
    assert (summary["phase"], summary["step"], summary["total_step"]) == ("second", 6, 18)
    assert summary["seen"].keys() == {"first.points", "second.points"} and summary["skipped"] == 0
    assert summary["lineage"] == {"data": "a"} and summary["config"]["first"]["max_steps"] == 12
    names = {path.name for path in whole.iterdir()}
    assert {"toy.pt", "toy_best.pt", "metrics.jsonl", "config.json", "notes.txt"} <= names
    assert len([name for name in names if "_step_" in name]) == 2  # keep_last
    losses = [line["loss"] for line in metrics(whole) if line["event"] == "val"]
    assert losses[-1] < losses[0]
    assert bytes(load_checkpoint(whole / "toy.pt")[0]["assets"]["notes.txt"].tolist()) == b"kept"


def test_throughput_is_that_of_all_steps_since_the_last_line(config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "run", "--run.print_freq", "4") == 0
    lines = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    first = [line for line in lines if line["event"] == "train" and line["phase"] == "first"]
    assert [line["step"] for line in first] == [4, 8, 12]
    for before, line in itertools.pairwise(first):
        seconds = line["timing"]["seconds"] - before["timing"]["seconds"]
        assert line["timing"]["throughput"] * seconds == pytest.approx(line["seen"] - before["seen"], rel=0.2)
    assert first[-1]["timing"]["seconds"] > 0


def test_the_second_phase_trains_its_part_alone(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", "--keep_last", "9")
    after_first, at_end = weights(tmp_path / "run", "toy_step_12.pt"), weights(tmp_path / "run")
    assert torch.equal(after_first["layers.0.weight"], at_end["layers.0.weight"])
    assert not torch.equal(after_first["outer.weight"], at_end["outer.weight"])


@pytest.mark.parametrize("step", [4, 8, 12, 16])
def test_resumed_from_any_checkpoint_is_undisturbed(step: int, whole: Path, config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", "--keep_last", "9")
    for path in (tmp_path / "run").glob("toy*.pt"):
        if path.name != f"toy_step_{step}.pt":
            path.unlink()
    assert train(config, tmp_path / "run", "--keep_last", "9") == 0
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_continues(sent: int, whole: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # no checkpoint is due before the end of the phase: what is found is what the signal saved
    child = start(config, run, "--sleep", "0.05", "--checkpoint_freq", "1000")
    wait_for_steps(child, run, 3)
    child.send_signal(sent)
    said, _ = child.communicate(timeout=240)
    assert child.returncode == 128 + sent, said
    assert "the same command continues" in said and "Traceback" not in said
    assert list(run.glob("toy_step_*.pt"))
    assert train(config, run) == 0
    assert_same(whole, run)


@pytest.mark.parametrize("steps", [5, 14])
def test_killed_and_continued_is_undisturbed(steps: int, whole: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(config, run, "--sleep", "0.03")
    wait_for_steps(child, run, steps)
    child.kill()
    child.communicate(timeout=240)
    assert not (run / "toy.pt").exists()
    assert train(config, run) == 0
    assert_same(whole, run)


def wait_for_steps(child: Child, run: Path, steps: int) -> None:
    """Until ``metrics.jsonl`` has that many training lines."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()[0]
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count('"train"') >= steps:
            return
        time.sleep(0.005)
    raise AssertionError("the run did not get there")


def test_damaged_checkpoint_is_named_and_the_one_before_used(
    whole: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "run", "--keep_last", "9")
    (tmp_path / "run" / "toy.pt").unlink()
    newest = tmp_path / "run" / "toy_step_16.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    capsys.readouterr()
    assert train(config, tmp_path / "run", "--keep_last", "9") == 0
    said = capsys.readouterr().out
    assert "passing over" in said and newest.name in said and "resuming from" in said
    assert_same(whole, tmp_path / "run")


def test_finished_run_is_left_alone(whole: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "toy.pt").read_bytes(), (whole / "metrics.jsonl").read_bytes()
    assert train(config, whole) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == ((whole / "toy.pt").read_bytes(), (whole / "metrics.jsonl").read_bytes())


def test_more_steps_may_be_asked_for(whole: Path, config: Path) -> None:
    assert train(config, whole, "--second.max_steps", "9") == 0
    assert read_summary(whole / "toy.pt")["step"] == 9


@pytest.mark.parametrize("words", [("--width", "9"), ("--data_name", "b")])
def test_another_model_or_data_is_refused(
    words: tuple[str, str], whole: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    assert train(config, whole, *words) == 1
    said = capsys.readouterr().err
    expected = "model.width: 8 -> 9" if words[0] == "--width" else 'lineage.data: "a" -> "b"'
    assert expected in said and "--fresh" in said
    assert before == {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}


def test_another_optimizer_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, tmp_path / "run", "--first.max_steps", "4", "--second.max_steps", "2") == 0
    for path in (tmp_path / "run").glob("toy_step_6.pt"):
        path.unlink()
    (tmp_path / "run" / "toy.pt").unlink()
    assert train(config, tmp_path / "run", "--second.optimizer", "muon") == 0  # nothing of phase two suits Muon
    other = tmp_path / "other"
    assert train(config, other, "--first.max_steps", "8", "--second.max_steps", "2") == 0
    for path in other.glob("toy*.pt"):
        if path.name != "toy_step_4.pt":
            path.unlink()
    assert train(config, other, "--first.optimizer", "adamw") == 1
    assert "first.optimizer: found adamw" in capsys.readouterr().err


def test_fresh_sets_the_earlier_run_aside(whole: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = weights(whole)
    assert train(config, whole, "--seed", "1", fresh=True) == 0
    (aside,) = whole.parent.glob("whole.before-*")
    assert str(aside) in capsys.readouterr().out
    assert all(torch.equal(old[key], value) for key, value in weights(aside).items())
    assert not torch.equal(old["outer.weight"], weights(whole)["outer.weight"])


def test_two_runs_in_one_folder_are_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = start(config, tmp_path / "run", "--sleep", "0.1")
    wait_for_steps(child, tmp_path / "run", 1)
    assert train(config, tmp_path / "run") == 1
    assert f"another run is writing here (process {child.pid} on " in capsys.readouterr().err
    child.kill()
    child.communicate(timeout=240)
    assert train(config, tmp_path / "run") == 0  # the lock of a dead process holds nobody up


# ---- what must not change the weights ----


def test_evaluation_changes_nothing(whole: Path, config: Path, tmp_path: Path) -> None:
    for often in ("1", "1000"):
        train(config, tmp_path / often, "--val_freq", often)
        assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(tmp_path / often).items())


def gradient(model: torch.nn.Module, compute_loss: Any, weights: dict[str, float], batches: list[Any]) -> torch.Tensor:
    """All gradients of one step of the loop, as one vector."""
    loop = object.__new__(Loop)
    loop.precision = Precision(torch.device("cpu"), torch.float32)
    loop.run = SimpleNamespace(model=model)  # type: ignore[assignment]
    loop.options, loop._watch = load_defaults().run, None
    loop.stage = SimpleNamespace(weights=weights, after_update=None, compute_loss=compute_loss)  # type: ignore[assignment]
    loop.parameters = list(model.parameters())
    loop.optimizer = torch.optim.SGD(loop.parameters, lr=0.0)
    loop.scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert loop._update(batches)[2] is None
    return torch.cat([p.grad.flatten() for p in loop.parameters if p.grad is not None])


def test_accumulation_is_one_large_batch_with_unequal_targets() -> None:
    """The gradient of 4 batches of 8 is that of one batch of 32, although they have different target counts."""
    data, gradients = Data(), []
    for parts in ([list(range(32))], [list(range(i, i + 8)) for i in range(0, 32, 8)], [[0], list(range(1, 32))]):
        seed_everything(0)
        batches = [data.collate([data.sample(i, None) for i in rows]) for rows in parts]
        gradients.append(gradient(Toy(8, 0.0), toy_loss, {"points": 1.0}, batches))
    seed_everything(0)
    model, batch = Toy(8, 0.0), data.collate([data.sample(i, None) for i in range(32)])
    (error_sum(model, batch) / batch.counts["points"]).backward()  # the mean over all targets, without the loop
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for found in gradients:
        assert torch.allclose(expected, found, rtol=0, atol=1e-6)


def toy_loss(model: Toy, batch: Any) -> dict[str, torch.Tensor]:
    return {"points": error_sum(model, batch)}


def load_defaults() -> ToyConfig:
    from omni.config import from_dict

    return from_dict(ToyConfig, {**CONFIG, "run": {"max_grad_norm": 1e9, "max_grad_explosion": 1e9}}, "test")


# ---- guards ----


def test_nan_steps_are_skipped_and_no_others(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # accumulation 2: calls 7 and 8 belong to step 4, call 15 to step 8
    assert train(config, run, "--poison", "[7, 15]") == 0
    skips = [line for line in metrics(run) if line["event"] == "skip"]
    assert [(line["phase"], line["step"]) for line in skips] == [("first", 4), ("first", 8)]
    assert all("nan" in line["why"] and line["rows"] for line in skips)
    assert read_summary(run / "toy.pt")["skipped"] == 2
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_batches_without_anything_that_is_trained(config: Path, tmp_path: Path) -> None:
    """Chats of text alone give a projector no gradient; that is no mistake, alone or beside another micro-batch."""
    assert train(config, tmp_path / "run", "--idle", "[5, 6, 9]") == 0
    summary = read_summary(tmp_path / "run" / "toy.pt")
    assert summary["skipped"] == 0 and summary["total_step"] == 18
    lines = [line for line in metrics(tmp_path / "run") if line["event"] == "train" and line["phase"] == "first"]
    assert [line["step"] for line in lines if line["grad_norm"] == 0] == [3]


def test_too_many_skips_in_a_row_stop_the_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ("--poison", json.dumps(list(range(11, 40))), "--max_consecutive_skips", "3")
    assert train(config, run, *words) == 1
    said = capsys.readouterr().err
    assert "3 batches in a row were skipped" in said and "Traceback" not in said
    good = weights(run, "toy_step_4.pt")
    assert all(torch.isfinite(value).all() for value in good.values())


def test_exploding_gradients_are_skipped(config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "run", "--max_grad_explosion", "1e-9", "--max_consecutive_skips", "4") == 1
    assert all("above 1e-09" in line["why"] for line in metrics(tmp_path / "run") if line["event"] == "skip")


def test_early_stopping(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # no improvement counts: the first validation is the best, the two after it are one too many
    words = ("--patience", "2", "--min_delta", "1e9", "--val_freq", "1")
    assert train(config, tmp_path / "run", *words) == 0
    validations = [(line["phase"], line["step"]) for line in metrics(tmp_path / "run") if line["event"] == "val"]
    assert validations == [("first", 1), ("first", 2), ("first", 3), ("second", 1), ("second", 2), ("second", 3)]
    assert "stopping early" in capsys.readouterr().out
    assert train(config, tmp_path / "run", *words) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_unknown_monitor_is_named(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, tmp_path / "run", "--monitor", "wer") == 1
    assert "monitor: found 'wer', expected one of loss" in capsys.readouterr().err


def test_best_checkpoint_is_the_best(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run, "--lr", "0.5", "--val_freq", "1", "--first.max_steps", "1")
    losses = [line["loss"] for line in metrics(run) if line["phase"] == "second" and line["event"] == "val"]
    assert read_summary(run / "toy_best.pt")["figures"]["second"]["loss"] == min(losses)


def test_guards_by_their_public_names() -> None:
    assert validate_loss(1.0, -1e6, 1e6) is None and validate_loss(float("nan"), -1e6, 1e6)
    assert validate_loss(2e6, -1e6, 1e6) and validate_loss(float("inf"), -1e6, 1e6)
    assert check_gradient_explosion(99.0, 100) is None
    assert check_gradient_explosion(101.0, 100) and check_gradient_explosion(float("nan"), 100)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0) == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, abs=1e-5)


def test_schedule_is_a_function_of_the_step() -> None:
    assert [lr_ratio(step, 4, 20, 0.1) for step in (0, 3)] == [0.25, 1.0]
    assert lr_ratio(20, 4, 20, 0.1) == pytest.approx(0.1) and lr_ratio(12, 4, 20, 0.1) == pytest.approx(0.55)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    set_lr = get_lr_scheduler(optimizer, 4, 20)
    assert set_lr(0) == optimizer.param_groups[0]["lr"] == 0.5
    assert set_lr(0) == 0.5  # asked twice, it answers the same


def test_read_only_folder_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, Path("/proc/nowhere")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: /proc/nowhere: cannot be written") and said.count("\n") == 1


def test_disk_full_leaves_the_last_checkpoint(whole: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (whole / "toy.pt").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert train(config, whole, "--second.max_steps", "9") == 1
    assert (whole / "toy.pt").read_bytes() == before
    with pytest.raises(UserError, match="No space left"):
        from omni.checkpoint import save_checkpoint

        save_checkpoint(whole / "x.pt", {}, {})


def test_what_a_phase_prepares_is_inference_in_the_runs_precision(config: Path, tmp_path: Path) -> None:
    def words(name: str) -> list[tuple[str, str]]:
        return [("run.save_dir", str(tmp_path / name)), ("use_amp", "true")]

    for name, dtype in (("one", torch.bfloat16), ("two", torch.float32)):
        precision = Precision(torch.device("cpu"), dtype)
        run, prepared = build(load_config(ToyConfig, config, words(name)), precision), []

        def watched(start: Any, model: Toy, prepared: list[Any]) -> Any:
            def prepare() -> Any:
                prepared.append((model.training, model.outer(torch.zeros(1, 8)).dtype))
                return start()

            return prepare

        run.phases = [(phase, watched(start, run.model, prepared)) for phase, start in run.phases]
        Loop(run, load_config(ToyConfig, config, words(name)), precision).train()
        assert prepared == [(False, dtype)] * 2
