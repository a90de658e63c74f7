"""What a run was made from."""

from __future__ import annotations

from pathlib import Path

from omni.lineage import code_version, data_fingerprint, differences


def test_differences_are_listed() -> None:
    found = list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}))
    assert found == ["a.c: 2 -> 3", "d: null -> 4"]


def test_data_is_told_by_contents_and_sizes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("wav,text\n1.wav,one\n")
    second.write_text("wav,text\n1.wav,one\n")
    wav = tmp_path / "1.wav"
    wav.write_bytes(b"1234")
    found = data_fingerprint(first, [wav])
    assert found == data_fingerprint(second, [wav]) and (found["media"], found["media_bytes"]) == (1, 4)
    wav.write_bytes(b"12345")
    assert data_fingerprint(first, [wav]) != found
    wav.write_bytes(b"1234")
    second.write_text("wav,text\n1.wav,two\n")
    assert data_fingerprint(second, [wav]) != found


def test_code_is_told_by_its_sources() -> None:
    code = code_version()
    assert code["version"] and code["source"] and len(code["source"]) == 16
