"""`omni inspect`: any checkpoint, any run, at any time; a hostile file is a line and not an end."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni.checkpoint import save_checkpoint
from omni.cli import main
from omni.config import UserError, changed_keys, load_config, to_dict
from omni.curves import read_metrics
from omni.inspection.ancestry import ancestry, changed_inputs
from omni.inspection.facts import amounts, config_differences, read_checkpoint
from omni.inspection.health import weight_health
from omni.inspection.html import inspection_page
from omni.inspection.plain import inspection_values
from omni.inspection.runs import RunRecord, inspect
from omni.inspection.text import inspection_text
from omni.summary import read_summary
from tests.conftest import ROOT, command, metrics
from tests.test_checkpoint import Bomb
from tests.test_training_loop import CONFIG, start, train, wait_for_steps

EMPTY: dict[str, Any] = {
    "phase": "train", "phases": ["train"], "step": 5, "max_steps": 5, "total_step": 5, "resumable": True, "skipped": 0,
    "seen": {"train.tokens": 100}, "seconds": 2.5, "parameters": {"layers": 12}, "precision": "fp32", "figures": {},
    "config": {"name": "made_up"}, "model_config": {}, "lineage": {}, "code": {"source": "abc"}, "changed": [],
}  # fmt: skip


def make(path: Path, kind: str, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> str:
    """Write a checkpoint and return its checksum."""
    save_checkpoint(path, {"weights": weights or {"w": torch.rand(3)}}, {"kind": kind, **EMPTY, **changes})
    return str(read_summary(path)["sha256"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the toy, in a folder of runs; it skipped a batch."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "toy.json").write_text(json.dumps(CONFIG))
    assert train(folder / "toy.json", folder / "checkpoints" / "toy", "--keep_last", "9", "--poison", "[3]") == 0
    return folder / "checkpoints" / "toy"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoints" / "toy"))


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    assert main(["inspect", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# seconds of computing, which others do not share as they do the clock, and the peak of this program's own memory in MiB
MEASURED = """
import re, sys, time
from omni.cli import main
code = main(["inspect", sys.argv[1]])
assert "torch" not in sys.modules
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()) if sys.platform == "linux" else None
print("USED", time.process_time(), int(peak[1]) / 1024 if peak else 0)
sys.exit(code)
"""


# ---- what it says ----


def test_a_run_is_what_its_files_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, run)
    (record,), log = found["runs"], metrics(run)
    summary = read_summary(run / "toy.pt")
    assert found["what"] == "run" and record["state"] == "finished" and record["name"] == "toy"
    for key in ("sha256", "phase", "step", "max_steps", "seen", "parameters", "precision", "skipped", "config"):
        assert record["checkpoint"][key] == summary[key]
    assert record["checkpoint"]["bytes"] == (run / "toy.pt").stat().st_size
    for phase in ("first", "second"):
        for event in ("train", "val"):
            lines = [line for line in log if (line["phase"], line["event"]) == (phase, event)]
            points = [[line["step"], line["loss"]] for line in lines if line["loss"] is not None]
            assert points and record["curves"][phase][event] == points
    first = next(item for item in record["validation"] if item["phase"] == "first")
    values = {line["step"]: line["loss"] for line in log if (line["phase"], line["event"]) == ("first", "val")}
    assert first["best"] == list(min(values.items(), key=lambda item: item[1]))
    assert first["last_step"] == 12 and first["last"] == {"loss": values[12]}
    assert [item["step"] for item in record["skipped"]] == [2] and summary["skipped"] == 1
    assert {Path(item["path"]).name for item in record["checkpoints"]} == {path.name for path in run.glob("*.pt")}
    assert "finished" in record["resume"]


def test_an_earlier_checkpoint_is_shown_as_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = printed(capsys, run / "toy_step_8.pt")["runs"]
    assert record["checkpoint"]["step"] == 8 and list(record["curves"]) == ["first"]
    assert max(step for step, _ in record["curves"]["first"]["train"]) == 8
    assert "goes on from toy.pt" in record["resume"]
    (record,) = printed(capsys, run / "toy_best.pt")["runs"]
    assert record["resume"].startswith("no: toy_best.pt holds weights alone")
    for path in run.glob("toy*.pt"):
        if path.name not in ("toy_step_4.pt", "toy_step_8.pt"):
            path.unlink()
    (record,) = printed(capsys, run)["runs"]
    assert record["state"] == "stopped" and record["checkpoint"]["step"] == 8
    assert record["resume"] == "yes, the same command continues"


def test_text_for_a_person(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    for expected in ("toy (toy), finished", "second step 6 of 6, phase 2 of 2; 18 steps in all", "skipped batches",
                     "toy.csv:", "toy_step_8.pt", "loss, first  (line: train, o: val)", "data: \"a\""):  # fmt: skip
        assert expected in said, expected
    assert any("\u2801" <= letter <= "\u28ff" for letter in said)  # the curve
    assert all(len(line) <= 160 for line in said.splitlines())
    assert main(["inspect", str(run.parent)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"toy +- +finished +second 6 of 6", said)


def test_differences_from_the_shipped_configuration() -> None:
    words = [("run.seed", "7"), ("model.talker.dropout", "0.1"), ("codec.lr", "0.004")]
    from train_talker import SpeechStageConfig

    path = ROOT / "configs" / "talker_nano.json"
    shipped = json.loads(path.read_text())

    def differences(overrides: list[tuple[str, str | None]]) -> list[tuple[str, Any, Any]]:
        config = load_config(SpeechStageConfig, path, overrides)
        changes = {"config": to_dict(config), "changed": list(changed_keys(config))}
        return config_differences(facts_of(**changes), shipped)

    assert differences([]) == []
    # one that the file does not name, one that it names, one that is set to what it says anyway
    assert differences(words) == [("model.talker.dropout", 0.0, 0.1), ("run.seed", ..., 7)]


def facts_of(**changes: Any) -> Any:
    from omni.inspection.facts import Facts

    return Facts(**{"kind": "talker", "sha256": "0" * 64, **EMPTY, **changes})


def test_amounts_are_what_was_heard_and_seen() -> None:
    mel = {"sample_rate": 16000, "hop_length": 160}
    assert amounts(facts_of(seen={"train.frames": 360_000}, model_config={"mel": mel})) == [
        "1.00 h of audio (360,000 frames)"
    ]
    seen = {"codec.frames": 6000, "vocoder.frames": 4800, "talker.frames": 2000}
    model = {"mel": mel, "codec": {"reduction": 3}}
    assert amounts(facts_of(seen=seen, model_config=model)) == [
        "codec: 1.0 min of audio (6,000 frames)",
        "vocoder: 48.0 s of audio (4,800 frames)",
        "talker: 1.0 min of audio (2,000 frames)",
    ]
    assert amounts(facts_of(seen={"train.images": 64})) == ["64 images"]


# ---- lineage ----


def family(folder: Path) -> tuple[Path, dict[str, str]]:
    """A made-up stage E on a D on an A."""
    names = {kind: folder / "checkpoints" / f"{kind}_x" / f"{kind}.pt" for kind in ("thinker", "talker", "omni")}
    hashes = {"thinker": make(names["thinker"], "thinker", lineage={"tokenizer": "t" * 16})}
    config = {"name": "x", "thinker_ckpt": str(names["thinker"]), "talker_ckpt": str(names["talker"])}
    hashes["talker"] = make(names["talker"], "talker", config=config, lineage={"thinker": hashes["thinker"]})
    lineage = {"thinker": hashes["thinker"], "talker": hashes["talker"], "audio_enc": None}
    hashes["omni"] = make(names["omni"], "omni", config=config, lineage=lineage)
    return names["omni"], hashes


def test_lineage_is_a_tree_that_knows_what_is_still_there(tmp_path: Path) -> None:
    path, hashes = family(tmp_path)
    root = ancestry(read_checkpoint(path))
    assert [(node.kind, node.sha256, node.state) for node in root.inputs] == [
        ("thinker", hashes["thinker"], "same"),
        ("talker", hashes["talker"], "same"),
    ]
    assert [node.sha256 for node in root.inputs[1].inputs] == [hashes["thinker"]]
    assert root.inputs[0].data == [("tokenizer", "t" * 12)] and not changed_inputs(root)
    # stage A is trained anew: all that is built on it says so, and would not be resumed
    thinker = tmp_path / "checkpoints" / "thinker_x" / "thinker.pt"
    thinker.rename(tmp_path / "earlier.pt")
    new = make(thinker, "thinker")
    root = ancestry(read_checkpoint(path))
    assert (root.inputs[0].state, root.inputs[0].now) == ("another file", new)
    assert root.inputs[1].inputs[0].state == "another file"
    said = inspection_text(inspect(path))
    assert "would be refused" in said and f"another file now ({new[:12]})" in said
    # ... unless it is found elsewhere
    assert ancestry(read_checkpoint(path), [read_checkpoint(tmp_path / "earlier.pt")]).inputs[0].state == "same"
    thinker.write_bytes(thinker.read_bytes()[:-50])
    assert "not a whole" in ancestry(read_checkpoint(path)).inputs[0].state
    thinker.unlink()
    assert ancestry(read_checkpoint(path)).inputs[0].state == "missing"


def test_a_moved_folder_finds_its_own(tmp_path: Path) -> None:
    path, hashes = family(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    root = ancestry(read_checkpoint(tmp_path / "moved" / "omni_x" / path.name))
    assert [node.state for node in root.inputs] == ["same", "same"]
    said = inspection_text(inspect(tmp_path / "moved"))
    assert said.count(hashes["omni"][:12]) == 2  # its row and the root of the only tree


def test_a_lineage_in_a_circle_ends(tmp_path: Path) -> None:
    path, weights = tmp_path / "x" / "thinker.pt", {"w": torch.ones(3)}
    own = make(path, "thinker", weights)
    # a summary is no part of the checksum: a file can name itself
    again = make(path, "thinker", weights, config={"name": "x", "thinker_ckpt": str(path)}, lineage={"thinker": own})
    assert own == again
    assert inspection_text(inspect(path)).count(own[:12]) > 2


# ---- hostile files, and files that change meanwhile ----


def foreign_zip(path: Path, summary: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"")
        archive.writestr("x/omni.json", summary)


def crowd(path: Path) -> None:
    """An archive whose end says that its directory has 3 GB; and one that says so in the larger record."""
    foreign_zip(path, b"{}")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.rfind(b"PK\5\6") + 12, 3 << 30)
    path.write_bytes(data)


def spoil(folder: Path, good: Path) -> Iterator[str]:
    """Write files that are no checkpoints; yields their names."""
    contents = {
        "torn.pt": good.read_bytes()[:-30],
        "text.pt": b"hello",
        "empty.pt": b"",
        "raw.pt": pickle.dumps(Bomb()),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield name
    torch.save({"w": torch.zeros(2)}, folder / "other.pt")
    yield "other.pt"
    os.mkfifo(folder / "pipe.pt")
    yield "pipe.pt"
    (folder / "loop.pt").symlink_to(folder / "loop.pt")
    yield "loop.pt"
    with (
        zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x/omni.json", "w") as member,  # 200 KB that unpack to 200 MB
    ):
        for _ in range(200):
            member.write(bytes(1 << 20))
    yield "bomb.pt"
    crowd(folder / "crowd.pt")
    yield "crowd.pt"
    whole = {"format": 1, "kind": "toy", "sha256": "1", **EMPTY}
    changes: dict[str, dict[str, Any]] = {
        "types.pt": {"step": "x"}, "phase.pt": {"phase": "none"}, "name.pt": {"config": {}},
        "huge.pt": {"seconds": 10**400}, "many.pt": {"seen": {"train.frames": 10**400}},
    }  # fmt: skip
    for name, change in changes.items():
        foreign_zip(folder / name, json.dumps({**whole, **change}).encode())
        yield name
    foreign_zip(folder / "deep.pt", b"[" * 100_000)
    yield "deep.pt"


def test_every_foreign_or_hostile_file_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(spoil(run, run / "toy.pt"))
    monkeypatch.chdir(run)
    done = command("-c", MEASURED, run)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not (run / "exploded").exists() and not (ROOT / "exploded").exists()
    lines = done.stdout.split("cannot be read:\n")[1].split("\n\n")[0].splitlines()
    assert sorted(re.findall(r"^  \S*/(\w+\.pt): ", "\n".join(lines), re.MULTILINE)) == sorted(names)
    assert len(lines) == len(names) and "toy (toy), finished" in done.stdout
    assert float(done.stdout.split()[-1]) < 300
    with pytest.raises(UserError, match=r"torn\.pt: not a whole"):
        inspect(run / "torn.pt")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name", "data", "mel"]), inner),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted({"kind", *EMPTY})), PLAIN)
def test_any_value_anywhere_in_a_summary_is_shown_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "any.pt"
    foreign_zip(path, json.dumps({"format": 1, "kind": "toy", "sha256": "1", **EMPTY, key: value}).encode())
    try:
        found = inspect(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    text = inspection_text(found)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert json.dumps(inspection_values(found), allow_nan=False) and inspection_page(found)


def test_a_file_cannot_steer_the_terminal_nor_the_page(tmp_path: Path) -> None:
    evil = "\ud800\x1b[2J\x1b]0;owned\x07<script>alert(1)</script>"
    make(tmp_path / "run" / "toy.pt", "toy", config={"name": evil}, lineage={"data": evil}, precision=evil)
    found = inspect(tmp_path / "run")
    assert "\x1b" not in inspection_text(found) and "\x07" not in inspection_text(found)
    assert "<script" not in inspection_page(found) and inspection_page(found).encode()


def test_a_log_that_is_being_written_or_damaged(run: Path) -> None:
    whole = read_metrics(run / "metrics.jsonl")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'not json\n{"phase": 3}\n[1]\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"phase": "second", "st')
    assert read_metrics(run / "metrics.jsonl") == whole and inspection_text(inspect(run))


def test_a_run_that_has_no_checkpoint_yet(tmp_path: Path) -> None:
    (tmp_path / "runs" / "young").mkdir(parents=True)
    line = {"phase": "train", "step": 10, "event": "train", "loss": 2.0}
    (tmp_path / "runs" / "young" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    said = inspection_text(inspect(tmp_path / "runs"))
    assert "young" in said and "no checkpoint" in said and "train step 10" in said
    assert inspection_text(inspect(tmp_path / "runs" / "young"))


@pytest.mark.parametrize("what", ["nothing", "empty", "text"])
def test_what_is_no_run_is_refused_in_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "text":
        path.write_text("hello")
    assert main(["inspect", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ") and said.count("\n") == 1


def test_while_it_trains(tmp_path: Path) -> None:
    """Checkpoints are replaced and pruned while they are read, and the log grows: every look succeeds."""
    (tmp_path / "toy.json").write_text(json.dumps(CONFIG))
    words = ["--sleep", "0.005", "--first.max_steps", "60", "--keep_last", "1", "--checkpoint_freq", "1"]
    child = start(tmp_path / "toy.json", tmp_path / "run", *words, "--val_freq", "1")
    wait_for_steps(child, tmp_path / "run", 2)
    states, steps = set(), set()
    while child.poll() is None:
        found = inspect(tmp_path / "run")
        assert not found.runs[0].problems and inspection_text(found)
        states.add(found.runs[0].state)
        steps.add(found.runs[0].shown.facts.total_step if found.runs[0].shown else 0)
    said = child.communicate()[0]
    assert child.returncode == 0, said
    assert len(steps) > 3
    if sys.platform.startswith("linux"):
        assert "running" in states
    assert inspect(tmp_path / "run").runs[0].state == "finished"


# ---- quick and small ----


def measured(folder: Path) -> tuple[float, float]:
    """Seconds and peak MiB of the whole command."""
    done = command("-c", MEASURED, folder)
    assert done.returncode == 0, done.stderr
    seconds, peak = done.stdout.split("USED ")[1].split()
    return float(seconds), float(peak)


def test_quick_and_small_beside_a_file_of_a_gigabyte(run: Path) -> None:
    """Its first gigabyte is a hole in the file, so that the disk has nothing to do."""
    big = run / "toy_step_17.pt"
    with big.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(0, os.SEEK_END)
        file.write((run / "toy_step_16.pt").read_bytes())
    assert len(inspect(run).runs[0].checkpoints) == len(list(run.glob("*.pt")))
    seconds, peak = measured(run.parent)
    assert seconds < 2 and peak < 500, (seconds, peak)


@pytest.mark.slow
def test_quick_and_small_beside_a_checkpoint_of_a_gigabyte(run: Path) -> None:
    make(run.parent / "big" / "toy.pt", "toy", {"w": torch.zeros(1 << 28)})
    assert (run.parent / "big" / "toy.pt").stat().st_size > 1 << 30
    seconds, peak = measured(run.parent)
    assert seconds < 2 and peak < 500, (seconds, peak)


# ---- weights ----


def record(path: Path) -> RunRecord:
    return inspect(path).runs[0]


def test_health_finds_what_was_broken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    matrix, bias, other = torch.randn(10, 6), torch.randn(10), torch.randn(4, 4)
    load = torch.tensor([[1.0, 1.0, 1.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
    before = {"layers.0.w": matrix, "layers.0.b": bias, "head.w": other, "codec.quantizer.load_KV": load}
    now = {key: value.clone() for key, value in before.items()}
    now["layers.0.w"][[2, 5]] = 0
    now["layers.0.w"][7] *= 1e-5
    now["head.w"][1, 1] = math.nan
    model = {"codec": {"quantizer": {"revive_below": 0.3}}}
    make(tmp_path / "toy_step_4.pt", "toy", before, total_step=4, model_config=model)
    make(tmp_path / "toy.pt", "toy", now, model_config=model)
    health = weight_health(record(tmp_path))
    assert health is not None and health.before is not None and health.before.path.name == "toy_step_4.pt"
    layer, head, _ = health.modules
    assert (layer.name, layer.num_dead, layer.num_units, layer.num_not_finite) == ("layers.0", 3, 10, 0)
    flat, old = (torch.cat([part["layers.0.w"].flatten(), part["layers.0.b"]]) for part in (now, before))
    assert layer.norm == pytest.approx(float(flat.norm()), rel=1e-5)
    assert layer.moved == pytest.approx(float((flat - old).norm() / old.norm()), rel=1e-5)
    assert (head.name, head.num_not_finite, head.num_dead) == ("head", 1, 0)
    first, second = health.codebooks
    assert (first.dead, second.dead) == (0.25, 0.75)
    assert first.perplexity == pytest.approx(3.0) and second.perplexity == pytest.approx(1.0)


def test_health_of_a_real_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--health", "--json"]) == 0
    (health,) = json.loads(capsys.readouterr().out)["health"]
    # the second phase trains the outer part alone
    moved = {item["name"]: item["moved"] for item in health["modules"]}
    assert Path(health["before"]).name in ("toy_step_16.pt", "toy_best.pt")
    assert moved["layers.0"] == 0 and moved["outer"] > 0 and health["not_finite_in_optimizer"] == 0


def test_health_runs_no_code_and_names_damage(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(run)
    save_checkpoint(run / "toy.pt", {"weights": {"w": Bomb()}}, {"kind": "toy", **EMPTY, "total_step": 99})
    assert main(["inspect", ".", "--health"]) == 1
    assert "weights of toy.pt: damaged" in capsys.readouterr().out and not (run / "exploded").exists()
    save_checkpoint(run / "toy.pt", {"weights": [1]}, {"kind": "toy", **EMPTY, "total_step": 99})
    assert main(["inspect", ".", "--health"]) == 1
    assert "found no weights in it" in capsys.readouterr().out


# ---- the page ----


def test_the_page_needs_nothing_else(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run.parent), "--html", str(tmp_path / "out.html"), "--health"]) == 0
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg") == 2 and "toy_step_16.pt" in page and "perplexity" not in page
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]*)', page)
    assert sources and all(source.startswith(("#", "data:")) for source in sources)
    assert "<script" not in page and "@import" not in page
