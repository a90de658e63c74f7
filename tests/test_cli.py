"""The `omni` command: instant help, whole runs that continue where they stopped, and clear refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import train_text
from omni import run
from omni.cli import main
from omni.config import UserError
from omni.evaluate import suite
from omni.report import results_table
from omni.run import stage_is_complete
from omni.stages import STAGES, StageInfo, read_raw_config, stage_of
from omni.summary import read_summary
from tests.conftest import ROOT, RunStage, command

FIGURE = {"value": 0.125, "n": 80, "low": 0.05, "high": 0.2}


# ---- help and usage ----


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["inspect", "--help"], ["serve", "--help"]])
def test_help_is_instant(words: list[str]) -> None:
    code = "import sys; from omni.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    done = command("-c", code, *words)
    assert done.returncode == 0 and "usage: omni" in done.stdout, done.stderr


@pytest.mark.parametrize("words", [[], ["fly"], ["run"], ["eval", "--size", "nano", "--stage", "nose"], ["data"]])
def test_wrong_usage_is_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


def test_unknown_size_names_the_known(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["run", "--size", "gigantic"]) == 1
    said = capsys.readouterr().err
    assert "configs/thinker_gigantic.json" in said and "nano" in said and said.count("\n") == 1
    assert main(["data", "synth", "--size", "gigantic", "--out", "/tmp"]) == 2


def test_outside_of_the_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--size", "nano"]) == 1
    assert "repository's folder" in capsys.readouterr().err


# ---- data check ----


def test_data_check_lists_all_problems(babble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.csv").write_text("wav,text\nx.wav,a\ny.wav,b\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    good = write(tmp_path, "audio_enc_good", train=str(babble / "asr.csv"))
    bad = write(tmp_path, "audio_enc_bad", train=str(tmp_path / "bad.csv"), val=str(babble / "asr.csv"))
    text = write(tmp_path, "thinker_bad", train=str(tmp_path / "bad.txt"), val="nowhere.txt")
    assert main(["data", "check", str(good)]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(good), str(bad), str(text), str(tmp_path / "none.json")]) == 1
    said = capsys.readouterr().out
    for expected in (
        "bad.csv:2: ",
        "bad.csv:3: ",
        "bad.txt:1: not UTF-8",
        "nowhere.txt: no such file",
        "none.json: no such",
    ):
        assert expected in said, expected
    assert "4 configurations, 5 problems, 0 warnings" in said


def write(folder: Path, name: str, **data: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"name": name, "data": data}))
    return path


# ---- evaluation without checkpoints ----


def test_missing_checkpoints_are_named_with_their_command(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small)
    assert main(["eval", "--size", "test", "--json", "out.json"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["thinker", "audio_enc", "vision", "codec", "talker", "omni"]
    assert "run `python train_vision.py --config configs/vision_test.json` first" in lines[2]
    assert json.loads(Path("out.json").read_text()) == {}
    assert main(["eval", "--size", "test", "--stage", "vision"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_speech_is_graded_by_what_the_talker_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("checkpoints/talker_mine/talker.pt")
    path.parent.mkdir(parents=True)
    path.touch()
    # it names a Thinker, and was made without one
    config, lineage = (
        {"audio_ckpt": "elsewhere/audio_enc.pt", "thinker_ckpt": "x.pt"},
        {"audio_enc": "1", "thinker": None},
    )
    monkeypatch.setattr(suite, "read_summary", lambda path: {"config": config, "lineage": lineage})
    command = "python train_audio_enc.py --config configs/audio_enc_mine.json"
    for name in ("codec", "talker"):
        assert suite.evaluate("mine", [name]).missing == [f"{name}: no elsewhere/audio_enc.pt; run `{command}` first"]


# ---- the table ----


def test_table_shows_value_interval_and_number() -> None:
    both = {"value": [0.5, 1.0], "n": 9, "low": [0.4, 0.9], "high": [0.6, 1.0]}
    lines = results_table({"audio_enc": {"wer": FIGURE}, "codec": {"usage": both}}).splitlines()
    assert lines[2].split() == ["audio_enc", "wer", "0.125", "[0.050,", "0.200]", "80"]
    assert lines[3].split() == ["codec", "usage", "0.500", "1.000", "[0.400,", "0.600]", "[0.900,", "1.000]", "9"]


# ---- a whole run ----


def small_config(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A shipped configuration, so small that a stage takes seconds."""
    for value in values.values():
        if isinstance(value, dict) and "max_steps" in value:
            value.update(max_steps=4, batch_size=4, warmup_steps=1)
            value.pop("monitor", None)
    values["run"].update(val_freq=4, checkpoint_freq=2, val_batches=1, print_freq=1, tensorboard=False, num_threads=1)
    shape = {"dim": 32, "num_layers": 1, "num_heads": 2, "hidden_dim": 64}
    if path.stem.startswith("thinker"):
        values["data"]["vocab_size"] = 400
        values["model"].update(shape, head_dim=0, num_kv_heads=1, ctx_len=128)
    elif path.stem.startswith("audio"):
        values["model"].update(shape)
    elif path.stem.startswith("vision"):
        values["model"].update(shape, text_dim=32, text_layers=1)
    elif path.stem.startswith("talker"):
        part = {"dim": 32, "num_layers": 1}
        values["model"].update(codec={"reduction": 3, **part}, talker=shape)
        values["val_sentences"] = 2
    else:
        values["data"]["val_questions"] = 4
    return values


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with configurations of size "test"."""
    (tmp_path / "configs").mkdir()
    for stage in STAGES:
        path = ROOT / stage.config_path("nano")
        values = json.loads(path.read_text().replace("nano", "test"))
        (tmp_path / stage.config_path("test")).write_text(json.dumps(small_config(path, values)))
    return tmp_path


def test_dry_run_does_nothing(small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    assert main(["run", "--size", "test", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for stage in STAGES:
        assert f"{stage.script} --config {stage.config_path('test')}" in said
    assert {path.name for path in small.iterdir()} == {"configs"}


@pytest.mark.slow
def test_whole_run_stopped_continued_and_skipped(small: Path) -> None:
    omni = ["-m", "omni.cli", "run", "--size", "test", "--jobs", "2"]
    words = [sys.executable, *omni]
    first = subprocess.Popen(words, cwd=small, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert first.stdout is not None
    said, begun = "", set[str]()
    for line in first.stdout:  # Ctrl-C when stages A and B are there
        said += line
        before, begun = len(begun), begun | {letter for letter in "AB" if line.startswith(f"{letter} | ")}
        if before < 2 == len(begun):
            first.send_signal(signal.SIGINT)
    assert first.wait(120) == 130, said
    assert "the same command continues" in said and "Traceback" not in said
    second = command(*omni, cwd=small)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "micro-world in data/test: complete, skipped" in second.stdout
    assert "report: runs/test/report.html" in second.stdout
    figures = json.loads((small / "runs/test/eval.json").read_text())
    assert list(figures) == ["thinker", "audio_enc", "vision", "codec", "talker", "omni"]
    for found in figures.values():
        assert all(set(figure) == {"value", "n", "low", "high"} for figure in found.values())
    assert {"wer", "cer", "wer_unseen_voices", "infeasible"} <= figures["audio_enc"].keys()
    assert {"bits_per_byte", "bits_per_byte_5gram", "perplexity"} == figures["thinker"].keys()
    began = time.monotonic()
    third = command(*omni, cwd=small)
    assert third.returncode == 0 and third.stdout.count("complete, skipped") == 9, third.stdout
    assert time.monotonic() - began < 30
    # another configuration of stage A: it and what is built on it are looked at again, and refused by name
    path = small / "configs/thinker_test.json"
    path.write_text(path.read_text().replace('"hidden_dim": 64', '"hidden_dim": 96'))
    fourth = command(*omni, cwd=small)
    assert fourth.returncode == 1 and "model.hidden_dim: 64 -> 96" in fourth.stderr, fourth.stderr


def test_finished_stage_is_recognized_by_its_summary(
    small: Path, babble: Path, monkeypatch: pytest.MonkeyPatch, run_here: RunStage
) -> None:
    monkeypatch.chdir(small)
    stage = STAGES[0]
    values = read_raw_config(stage.config_path("test"))
    assert not stage_is_complete(stage, "test", values)
    text = babble / "text.txt"
    values["data"] = {"train": str(text), "vocab_size": 320}
    stage.config_path("test").write_text(json.dumps(values))
    done = run_here(train_text.TextConfig, train_text.build, "--config", stage.config_path("test"))
    assert done.returncode == 0, done.stderr
    assert stage_is_complete(stage, "test", values)
    assert not stage_is_complete(stage, "test", {**values, "train": {**values["train"], "max_steps": 9}})
    path = stage.checkpoint("test")
    assert read_summary(path)["kind"] == "thinker"
    path.write_bytes(path.read_bytes()[:-100])
    assert not stage_is_complete(stage, "test", values)


def test_what_a_stage_did_without_makes_it_no_less_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = next(stage for stage in STAGES if stage.kind == "talker")
    lineage: dict[str, str | None] = {"thinker": None, "audio_enc": "now"}
    monkeypatch.setattr(run, "read_summary", lambda path: {"lineage": lineage, "config": {"name": "talker_x"}})
    monkeypatch.setattr(run, "fingerprint", lambda path: "now")
    monkeypatch.setattr(StageInfo, "checkpoint", lambda stage, size: Path(f"{stage.kind}.pt"))
    assert stage_is_complete(stage, "x", {"name": "talker_x"})
    for kind in ("audio_enc", "thinker"):
        monkeypatch.setitem(lineage, kind, "before")
        assert not stage_is_complete(stage, "x", {"name": "talker_x"})
        monkeypatch.setitem(lineage, kind, "now")


def test_a_stage_waits_only_for_what_its_configuration_uses(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    path = stage_of("talker").config_path("test")
    for use, needs in ((False, ("data", "audio_enc")), (True, ("data", "thinker", "audio_enc"))):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_thinker_states": use}))
        steps = {step.name: step for step in run.plan("test", run.RunFolder.open("test"))}
        assert steps["talker"].needs == needs
        assert set(steps["omni_sft"].needs) == {"data", "thinker", "audio_enc", "vision", "talker"}
    Path("configs/judge_test.json").write_text('{"name": "judge_test"}')
    found = run.plan("test", run.RunFolder.open("test"))
    assert [step.name for step in found[5:7]] == ["judge", "omni_sft"] and "judge" in found[6].needs


def test_a_checkpoint_without_a_configuration_of_its_own_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--save_dir checkpoints/audio_enc_digits` on the command line, then `omni eval --size digits`."""
    monkeypatch.chdir(tmp_path)
    stage = next(stage for stage in STAGES if stage.kind == "audio_enc")
    with pytest.raises(UserError, match="no such configuration"):
        stage.checkpoint("digits")
    path = tmp_path / "checkpoints" / "audio_enc_digits" / "audio_enc.pt"
    path.parent.mkdir(parents=True)
    path.touch()
    assert stage.checkpoint("digits") == path.relative_to(tmp_path)


def test_a_reader_who_has_seen_enough_is_no_mistake() -> None:
    """`omni ... | head` closes the pipe while lines still come."""
    code = """
import sys
from omni.console import user_errors
sys.exit(user_errors(lambda: [print(number) for number in range(100000)] and 0))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.readline() == b"0\n"
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(timeout=60) == 141
    child.stderr.close()
