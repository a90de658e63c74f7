"""What a plan foretells: counted memory and operations, the peak of a real run, "auto", and running out of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sft_omni
import train_text
from omni import planning
from omni.cli import main
from omni.config import PhaseConfig, UserError, load_config, to_dict
from omni.data_memory import data_memory
from omni.features import FeatureStore
from omni.plan_types import GIB, RESERVE, PhaseCost, PhasePlan, Plan, Point
from omni.plan_view import plan_text
from omni.planning import Wish, automatic_phases, plan_config, settle_batch_sizes
from omni.step_cost import LiveBytes, flop_counter
from omni.training_utils import run_stage
from tests.chaos.small_stages import write_config
from tests.conftest import ROOT, write_tone
from tests.small_omni import make_world

# ---- counting ----


def test_tensors_count_while_they_live() -> None:
    with LiveBytes() as live:
        x = torch.zeros(1000)
        view = x.view(10, 100)[2:]
        x += 1
        assert live.now == 4000  # one storage, whatever looks at it and writes to it
        del x
        assert live.now == 4000
        del view
        assert (live.now, live.peak) == (0, 4000)
        layer = nn.Linear(100, 50, bias=False)
        y = layer(torch.ones(8, 100)).relu()
        held = live.now
        assert held == 4 * (5000 + 800 + 400)  # weights, input and what relu left: the product is gone
        y.sum().backward()
        assert live.now == 4 * (5000 + 5000 + 400)  # the input is not needed any more, a gradient is there
        live.begin_peak()
        assert live.peak == live.now


def test_operations_of_attention_and_grouped_convolutions() -> None:
    q = torch.randn(2, 3, 40, 16, requires_grad=True)
    with flop_counter() as counter:
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 3 * 40 * 40 * 16) * (2 + 5)
    grouped = nn.Conv1d(64, 64, 5, groups=64)
    with flop_counter() as counter:
        grouped(torch.randn(2, 64, 100, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 64 * 96 * 5)


# ---- working it out ----


def cost(**changes: Any) -> PhaseCost:
    def point(batch_size: int, activations: int, peak: int) -> Point:
        return Point(batch_size, 100, 50, 150, activations, peak, 2000, 10.0 * batch_size, 25)

    points = point(2, 80, 500), point(4, 160, 600)
    return PhaseCost(**{"name": "train", "cpu": points, "cuda": points, "program": 1000} | changes)


def test_a_plan_grows_with_the_batch_and_its_parts_add_up() -> None:
    found = cost()
    assert [found.peak("cuda", size) for size in (2, 4, 10)] == [500, 600, 900]
    # a process on the CPU grows by more than its tensors
    assert [cost(heap=1.5).peak(kind, 10) for kind in ("cpu", "cuda")] == [1350, 900]
    phase = PhasePlan(PhaseConfig(max_steps=10, batch_size=10, lr=0.1, gradient_accumulation_steps=3), found)
    parts = phase.parts("cpu", 10)
    assert sum(parts.values()) == 900
    assert parts["activations"] == 400 and parts["workspace"] == 200
    assert phase.flops() == 300.0
    # the very batch that fits, and not one row more
    room = RESERVE + found.peak("cuda", 37)
    assert found.largest_batch("cuda", room) == 37 and found.largest_batch("cuda", room - 1) == 36
    assert found.largest_batch("cpu", 1000 + found.peak("cpu", 12) + 7, caches=7) == 12
    assert found.largest_batch("cuda", RESERVE) == 0
    assert found.largest_batch("cuda", 10**12) == 1024


def test_several_gpus_share_a_batch_and_hold_gradients_twice() -> None:
    phase = PhasePlan(PhaseConfig(max_steps=3600, batch_size=10, lr=0.1), cost(seconds=2.0, device="a card"))
    one, four = (Plan("x", (phase,), None, 12 * GIB, gpus) for gpus in (1, 4))
    assert four.rows(phase) == 3
    assert four.peak(phase, "cuda") == phase.cost.peak("cuda", 3) + 50
    assert (one.hours(phase), four.hours(phase)) == (2.0, 0.5)
    assert "fits 12 GB: yes" in plan_text(four) and "4 GPUs" in plan_text(four)
    tight = Plan("x", (phase,), None, RESERVE + 800)
    assert not tight.fits(phase) and tight.largest_batch(phase) == 8
    assert "fits 1 GB: NO; largest batch that fits: 8" in plan_text(tight)
    assert one.values()["phases"]["train"]["cpu"]["peak"] == 1900


# ---- against what a run really takes ----


# What the system says of a child that ended (`ru_maxrss`) begins with what its parent had when it started it, here the
# memory of all tests before; so the child says itself what it has had since.
MEASURED = """
import runpy, sys
from omni.rehearsal import peak_resident
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("PEAK", peak_resident())
"""


def peak_of_run(*words: str | Path) -> int:
    """The most memory that a script had, run as a person runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.rsplit("PEAK", 1)[1])


def shaped(letter: str, world: Path, folder: Path, batch_size: int, model: dict[str, Any]) -> Path:
    """A stage whose activations are most of its memory."""
    path = write_config(letter, world, folder, folder)
    values = json.loads(path.read_text())
    prefix = {"A": "thinker", "B": "audio_enc"}[letter]
    values["name"] = f"{prefix}_wide"
    if letter == "A":
        del values["primer"], values["data"]["primer"]
    values["model"] |= model
    values["train"] |= {"batch_size": batch_size, "max_steps": 2, "gradient_accumulation_steps": 1}
    values["run"] |= {"val_freq": 10, "checkpoint_freq": 10}
    values["data"] |= {"allow_leaks": True}
    path.write_text(json.dumps(values))
    return path


def check_prediction(path: Path, script: str, save_dir: Path) -> None:
    plan = plan_config(path, Wish(seconds=0, device="cpu"))
    (phase,) = plan.phases
    foretold = plan.peak(phase, "cpu")
    parts = phase.parts("cpu", phase.config.batch_size)
    assert parts["activations"] + parts["workspace"] > foretold / 2, "shapes of which activations are most"
    measured = peak_of_run(script, "--config", path, "--save_dir", save_dir)
    print(f"{path.name}: foretold {foretold / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert abs(foretold / measured - 1) < 0.2, (foretold, measured)


def test_foretold_memory_of_text_is_what_a_run_takes(babble: Path, tmp_path: Path) -> None:
    path = shaped("A", tmp_path, tmp_path, 128, {"ctx_len": 256, "dim": 64, "num_layers": 6, "hidden_dim": 192})
    values = json.loads(path.read_text())
    text = tmp_path / "long.txt"
    text.write_text((babble / "text.txt").read_text() * 3)  # enough for 128 windows
    values["data"] |= {"train": str(text), "val": str(text), "vocab_size": 320}
    path.write_text(json.dumps(values))
    check_prediction(path, "train_text.py", tmp_path / "run")


@pytest.mark.slow
def test_foretold_memory_of_speech_is_what_a_run_takes(tmp_path: Path) -> None:
    lines = ["wav,text,speaker"]
    for number in range(128):
        write_tone(tmp_path / f"{number}.wav", 4.0, 200 + 10 * number)
        lines.append(f"{number}.wav,the red circle is above it,s")
    (tmp_path / "asr.csv").write_text("\n".join(lines) + "\n")
    path = shaped("B", tmp_path, tmp_path, 128, {"dim": 64, "num_layers": 4, "hidden_dim": 192, "reduction": 2})
    values = json.loads(path.read_text())
    values["data"] |= {"train": str(tmp_path / "asr.csv"), "val": str(tmp_path / "asr.csv")}
    path.write_text(json.dumps(values))
    check_prediction(path, "train_audio_enc.py", tmp_path / "run")


# ---- the command, "auto", and out of memory ----


def text_config(babble: Path, folder: Path, **train: Any) -> Path:
    path = write_config("A", folder, folder, folder)
    values = json.loads(path.read_text())
    values["data"] |= {"train": str(babble / "text.txt"), "val": str(babble / "text.txt"), "vocab_size": 320}
    values["data"] |= {"allow_leaks": True}
    values["train"] |= {"max_steps": 3, **train}
    del values["primer"], values["data"]["primer"]
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Plans without a rehearsal, and what was asked for."""
    asked: list[Any] = []

    def found(request: Any) -> tuple[list[PhaseCost], int]:
        asked.append(request)
        return [cost()], 0

    monkeypatch.setattr(planning, "_rehearse", found)
    return asked


def test_omni_plan_shows_and_refuses(
    babble: Path, tmp_path: Path, rehearsed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = text_config(babble, tmp_path)
    other = tmp_path / "mine.json"
    other.write_text(json.dumps({**json.loads(path.read_text()), "name": "mine"}))
    assert main(["plan", str(other)]) == 1  # no stage's name
    said = capsys.readouterr().err
    assert "found 'mine'" in said and "thinker_..." in said and said.count("\n") == 1
    assert main(["plan", str(path), "--memory", "8", "--gpus", "2", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["memory"] == 8 * GIB and plan["gpus"] == 2 and plan["phases"]["train"]["fits"]
    assert rehearsed[-1].seconds == 10
    assert main(["plan", str(path), "--gpus", "0"]) == 2


def test_auto_is_what_fits_and_stays_what_it_was(babble: Path, tmp_path: Path, rehearsed: list[Any]) -> None:
    path = text_config(babble, tmp_path, batch_size="auto")
    config = load_config(train_text.TextConfig, path, [("save_dir", str(tmp_path / "run"))])
    assert automatic_phases(config) == ["train"]
    room = 1000 + cost().peak("cpu", 11)
    settled = settle_batch_sizes(config, "train_text.py", "cpu", room)
    assert settled.train.batch_size == 11 and len(rehearsed) == 1
    shared = settle_batch_sizes(config, "train_text.py", "cpu", room, num_ranks=2)
    assert shared.train.batch_size == 22
    with pytest.raises(UserError, match="not one sample fits"):
        settle_batch_sizes(config, "train_text.py", "cpu", 10)
    # a run goes on with the batches that it began with, however much memory is free now
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"train": {"batch_size": 5}}))
    assert settle_batch_sizes(config, "train_text.py", "cpu", room).train.batch_size == 5
    assert settle_batch_sizes(config, "train_text.py", "cpu", room, fresh=True).train.batch_size == 11
    overridden = load_config(train_text.TextConfig, path, [("batch_size", "3")])
    assert automatic_phases(overridden) == [] and settle_batch_sizes(overridden, "x", "cpu", 0) is overridden
    with pytest.raises(UserError, match='a whole number or "auto"'):
        load_config(train_text.TextConfig, text_config(babble, tmp_path, batch_size="all"))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("can't allocate memory")],
)
def test_out_of_memory_is_a_message_with_the_plan(
    error: Exception,
    babble: Path,
    tmp_path: Path,
    rehearsed: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_much(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(train_text, "loss", too_much)
    path = text_config(babble, tmp_path, batch_size=6)
    words = ["--config", str(path), "--save_dir", str(tmp_path / "run")]
    assert run_stage(train_text.TextConfig, train_text.build, words) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "train: out of memory with 6 rows" in said
    assert "--train.batch_size 3 --train.gradient_accumulation_steps 6" in said and "--model.ctx_len" in said
    assert "phase train" in said and "activations" in said  # the plan


def test_another_runtime_error_stays_what_it_is(babble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(train_text, "loss", wrong)
    words = ["--config", str(text_config(babble, tmp_path)), "--save_dir", str(tmp_path / "run")]
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_stage(train_text.TextConfig, train_text.build, words)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("stage", ["thinker", "audio_enc", "vision", "talker", "omni_sft"])
def test_shipped_sizes_can_be_planned_and_fit(stage: str, size: str) -> None:
    plan = plan_config(ROOT / "configs" / f"{stage}_{size}.json", Wish(seconds=0, device="cpu"))
    assert all(plan.fits(phase) for phase in plan.phases), plan_text(plan)


def test_features_that_stage_e_keeps_are_foretold(tmp_path: Path) -> None:
    config = load_config(sft_omni.OmniSFTConfig, make_world(tmp_path))
    values = to_dict(config)
    model, tokenizer, _ = sft_omni.assemble(config)
    features = FeatureStore(model, tokenizer)
    pictures, sounds = ([str(tmp_path / f"{number}.{kind}") for number in range(9)] for kind in ("png", "wav"))
    features.add(pictures, sounds)
    kept = 2 * (sum(map(numel, map(features.image, pictures))) + sum(map(numel, map(features.audio, sounds))))
    assert data_memory("omni", values) == pytest.approx(kept, rel=0.05)


def numel(x: torch.Tensor) -> int:
    return x.numel()
