"""The benchmark measures what it says, in small; no figure of speed is held to anything here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import bare, features, variants
from bench.__main__ import measure_peers, table
from bench.measure import Timed, matmul_peak, measure_stage, padding, request_of
from omni.data.text import TextBatch
from omni.rehearsal import rehearsal
from omni.runtime import Precision
from omni.stand_ins import Wanted
from omni.tokenizer import IGNORE
from tests.chaos.small_stages import write_config
from tests.small_omni import make_world

FP32 = Precision(torch.device("cpu"), torch.float32)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A small stage A whose data are not there."""
    path = write_config("A", tmp_path / "nowhere", tmp_path, tmp_path)
    values = json.loads(path.read_text())
    values["name"] = "thinker_small"
    del values["primer"], values["data"]["primer"]
    values["train"]["gradient_accumulation_steps"] = 2
    path.write_text(json.dumps(values))
    return path


def test_a_stage_is_measured(config: Path) -> None:
    peak = matmul_peak(FP32, 0.05)
    (found,) = measure_stage(config, FP32, 0.2, peak, num=8)
    assert found["steps"] >= 5 and found["throughput"] > 0
    # a product of this size cannot be faster than a large one, and something of a step is waiting
    assert 0 < found["mfu"] < 1 and 0 < found["waiting"] < 1 and 0 <= found["padding"] < 0.5
    text = table({"machine": {"device": "a", "torch": "b"}, "stages": [found], "peers": [], "memory": []})
    assert "thinker_small" not in text and f"| {config.stem}, train | 2 x 2 |" in text


def test_the_bare_step_does_what_the_loop_does(config: Path) -> None:
    weights = []
    for bare_step in (False, True):
        with rehearsal(request_of(config), FP32, lambda phase: phase, Wanted(8, longest=False), Timed) as loop:
            assert isinstance(loop, Timed)
            for name in loop.phases():
                loop.begin(name)
                loop._set_lr(0)
                batches, _ = loop._fetch()
                torch.manual_seed(0)  # of dropout
                loop.bare() if bare_step else loop._update(batches)
                weights.append([item.detach().clone() for item in loop.parameters])
    moved = [float((a - b).abs().max()) for a, b in zip(*weights, strict=True)]
    # the loop divides by the targets of both micro-batches, which have nearly as many
    assert max(moved) < 0.01


def test_padding_is_counted() -> None:
    labels = torch.tensor([[5, 6, IGNORE, IGNORE], [1, 2, 3, IGNORE]])
    batch = TextBatch({"tokens": 5}, labels, labels, labels > 0, torch.zeros_like(labels))
    assert padding(batch) == (3, 8)
    assert padding(object()) == (0, 0)


def test_without_the_usual_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bare.importlib.util.find_spec
    monkeypatch.setattr(bare.importlib.util, "find_spec", lambda name: None if name == "jiwer" else real(name))
    monkeypatch.setitem(sys.modules, "jiwer", sys.modules["jiwer"])
    assert bare.fill_in() == ["jiwer"]
    stand_in: Any = sys.modules["jiwer"]
    with pytest.raises(ModuleNotFoundError, match="jiwer is not installed"):
        stand_in.process_words("a", "b")
    files, wave = bare._wav_files(), 0.5 * np.sin(np.arange(1600) / 9)
    files.write(tmp_path / "a.wav", wave, 16000)
    with files.SoundFile(str(tmp_path / "a.wav")) as file:
        assert (file.samplerate, file.frames, file.format) == (16000, 1600, "WAV")
        np.testing.assert_allclose(file.read()[:, 0], wave, atol=1e-4)


def test_a_peer_has_the_stage_s_shape(config: Path) -> None:
    pytest.importorskip("transformers")
    from bench.peers import measure_peer

    with rehearsal(request_of(config), FP32, lambda phase: phase, Wanted(8, longest=False), Timed) as loop:
        assert isinstance(loop, Timed)
        for name in loop.phases():
            loop.begin(name)
            found = measure_peer(loop, 0.1)
    assert found["parameters"] == found["our_parameters"]  # the Thinker's layout is Qwen3's
    assert found["ratio"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["thinker", "audio_enc", "vision"])
def test_peers_take_the_stage_s_batches(stage: str) -> None:
    pytest.importorskip("transformers")
    found = measure_peers(Path(f"configs/{stage}_nano.json"), FP32, 0.5)
    assert [row["setting"] for row in found] == ["equal", "default"]
    for row in found:
        assert 0.1 < row["parameters"] / row["our_parameters"] < 3
        assert row["ratio"] == pytest.approx(row["throughput"] / row["peer_throughput"], rel=0.5)


def test_variants_take_equal_steps_or_equal_time(
    babble: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_config("A", babble, tmp_path, tmp_path)
    values = json.loads(path.read_text())
    values["name"] = "thinker_small"
    values["data"] |= {"train": str(babble / "text.txt"), "val": str(babble / "text.txt"), "allow_leaks": True}
    values["train"] |= {"max_steps": 6}
    values["run"] |= {"val_freq": 3, "print_freq": 1, "num_threads": 1}
    del values["primer"], values["data"]["primer"]
    path.write_text(json.dumps(values))
    words = [str(path), "--seeds", "0", "1", "--vary", "wide=--model.hidden_dim 512", "--out", str(tmp_path / "out")]
    for equal in ("steps", "time", "time"):
        assert variants.main([*words, "--equal", equal]) == 0
        said = capfd.readouterr()
        head, _, own, wide = (line.strip("| ").split(" | ") for line in said.out.strip().splitlines())
        assert head[:4] == ["variant", "parameters", "steps", "seconds"] and "bits_per_byte" in head
        assert [own[0], wide[0]] == [path.stem, "wide"] and float(own[1][:-2]) < float(wide[1][:-2])
        assert own[2] == "6" and (wide[2] == "6" or equal == "time")
        mean, low, high = (
            float(cell)
            for cell in own[head.index("bits_per_byte")].replace(",", "").replace("[", "").replace("]", "").split()
        )
        assert low < mean < high  # two seeds
    assert "ms a step" not in said.err  # the second time it was known
    every = ["--every", "--train.max_steps 2 --train.warmup_steps 1", "--out", str(tmp_path / "every")]
    assert variants.main([*words, *every]) == 0
    assert [line.split(" | ")[2] for line in capfd.readouterr().out.splitlines()[2:]] == ["2", "2"]
    assert variants.main([*words, "--phase", "sft"]) == 1 and "expected one of train" in capfd.readouterr().err
    assert variants.main([str(path), "--vary", "wide"]) == 1 and "expected a name and words" in capfd.readouterr().err


def test_epochs_with_and_without_the_feature_cache_end_alike(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_world(tmp_path)
    words = ["--chats", "6", "--device", "cpu"]
    assert features.main([str(path), *words]) == 0
    lines = capfd.readouterr().out.splitlines()[-4:]
    assert [line.partition(":")[0] for line in lines] == ["no cache", "first epoch", "second epoch", "second epoch"]
    assert "times as fast" in lines[-1] and "6 chats" in lines[-1]
