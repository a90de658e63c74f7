"""What a run was made from."""

from __future__ import annotations

from omni.lineage import differences


def test_differences_are_listed() -> None:
    found = list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}))
    assert found == ["a.c: 2 -> 3", "d: null -> 4"]
