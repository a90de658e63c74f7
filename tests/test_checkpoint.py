"""Checkpoints: whole or not at all, and never code."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni import checkpoint
from omni.checkpoint import as_bytes, as_tensor, load_checkpoint, load_input, load_weights, save_checkpoint
from omni.config import UserError
from omni.summary import DamagedCheckpointError, read_summary

SUMMARY = {"kind": "toy", "total_step": 5, "step": 5}


def tensors(value: float = 1.0) -> dict[str, object]:
    return {"weights": {"w": torch.full((4, 3), value)}, "nested": [1, {"a": torch.arange(3)}, "text", None, 2.5]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "toy.pt"
    save_checkpoint(path, tensors(), SUMMARY)
    return path


def test_round_trip(saved: Path) -> None:
    loaded, summary = load_checkpoint(saved)
    assert torch.equal(loaded["weights"]["w"], torch.ones(4, 3))
    assert loaded["nested"][0] == 1 and loaded["nested"][1]["a"].tolist() == [0, 1, 2] and loaded["nested"][4] == 2.5
    assert summary["kind"] == "toy" and summary == read_summary(saved)
    assert as_bytes(as_tensor(b"\x00abc")) == b"\x00abc"
    assert not list(saved.parent.glob(".*"))  # nothing is left over


def test_plain_torch_reads_it(saved: Path) -> None:
    assert torch.equal(torch.load(saved, weights_only=True)["weights"]["w"], torch.ones(4, 3))


def test_same_contents_same_fingerprint(saved: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "again" / "toy.pt", tensors(), SUMMARY)
    save_checkpoint(tmp_path / "other" / "toy.pt", tensors(2.0), SUMMARY)
    first, again, other = (checkpoint.fingerprint(tmp_path / name / "toy.pt") for name in ("", "again", "other"))
    assert first == again != other


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 9999), flip=st.integers(1, 255))
def test_one_changed_byte_is_noticed_or_changes_nothing(saved: Path, place: int, flip: int) -> None:
    data = bytearray(saved.read_bytes())
    data[int(place / 10_000 * len(data))] ^= flip
    damaged = saved.with_name("damaged.pt")
    damaged.write_bytes(data)
    try:
        loaded, summary = load_checkpoint(damaged)
    except DamagedCheckpointError as error:
        assert "damaged.pt" in str(error) and "\n" not in str(error).strip()
        return
    # zip archives have bytes that mean nothing (padding, dates, permissions)
    assert torch.equal(loaded["weights"]["w"], torch.ones(4, 3))
    assert loaded["nested"][0] == 1 and summary["total_step"] == 5


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 9999))
def test_truncated_anywhere_is_noticed(saved: Path, place: int) -> None:
    data = saved.read_bytes()
    torn = saved.with_name("torn.pt")
    torn.write_bytes(data[: int(place / 10_000 * len(data))])
    with pytest.raises(DamagedCheckpointError, match=r"torn\.pt"):
        load_checkpoint(torn)


def test_every_member_is_covered_by_the_checksum(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        names = archive.namelist()
    for changed in names:
        if checkpoint.is_summary(changed):
            continue
        copy = saved.with_name("copy.pt")
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(copy, "w") as new:
            for name in names:
                data = old.read(name)
                new.writestr(name, data + b"x" if name == changed else data)
        with pytest.raises(DamagedCheckpointError, match="damaged"):
            load_checkpoint(copy)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_foreign_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"foreign\.pt"):
        load_checkpoint(path)


def test_somebody_elses_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(DamagedCheckpointError, match="not a μOmni checkpoint"):
        load_checkpoint(tmp_path / "other.pt")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('exploded').touch()",))


def test_pickle_bomb_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "bomb.pt", {"w": Bomb()}, SUMMARY)  # with a valid checksum
    assert read_summary(tmp_path / "bomb.pt")["kind"] == "toy"
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists()  # it is one


@pytest.mark.parametrize("where", ["save", "digest", "replace"])
def test_failing_write_leaves_the_old_file(where: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target, name = {"save": (torch, "save"), "digest": (checkpoint, "_digest"), "replace": (Path, "replace")}[where]
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(saved, tensors(9.0), SUMMARY)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert not list(saved.parent.glob(".*"))


def test_summary_needs_no_torch(saved: Path) -> None:
    code = f"""
import sys
from omni.summary import read_summary
assert read_summary({str(saved)!r})["total_step"] == 5
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_wrong_weights_are_listed(saved: Path) -> None:
    module = torch.nn.Linear(3, 4)
    with pytest.raises(UserError) as caught:
        load_weights(module, {"weight": torch.zeros(4, 2), "extra": torch.zeros(1)}, "here")
    lines = str(caught.value).splitlines()
    assert lines[1:] == ["  missing: bias", "  unexpected: extra", "  weight: found shape (4, 2), expected (4, 3)"]


def test_input_of_another_kind_or_missing_names_the_command(saved: Path) -> None:
    with pytest.raises(UserError, match="expected one of thinker; run `python x`"):
        load_input(saved, "thinker", "python x")
    with pytest.raises(UserError, match=r"nothing\.pt: no such checkpoint.*run `python x` first"):
        load_input(saved.with_name("nothing.pt"), "thinker", "python x")


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for name in ("toy_step_5.pt", "toy_step_40.pt", "toy_step_100.pt", "toy_best.pt", "toy.pt", "toy_step_x.pt"):
        (tmp_path / name).touch()
    checkpoint.prune(tmp_path, "toy", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "toy.pt", "toy_best.pt", "toy_step_100.pt", "toy_step_40.pt", "toy_step_x.pt",
    ]  # fmt: skip
