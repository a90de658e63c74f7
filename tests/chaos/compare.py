"""Whether two runs ended alike, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from omni.checkpoint import load_checkpoint
from tests.conftest import metrics


def difference(one: Path, other: Path, kind: str) -> str:
    """The first difference in what two runs wrote and in what they learned; empty where there is none."""
    try:
        ours, theirs = metrics(one), metrics(other)
    except ValueError as error:
        return f"metrics.jsonl: not JSON: {error}"
    for number, (mine, its) in enumerate(zip(ours, theirs, strict=False), 1):
        if mine != its:
            keys = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
            return f"metrics.jsonl:{number}: {keys}:\n  {mine}\n  {its}"
    if len(ours) != len(theirs):
        return f"metrics.jsonl: {len(ours)} and {len(theirs)} lines"
    for name in (f"{kind}.pt", f"{kind}_best.pt"):
        (mine, _), (its, _) = (load_checkpoint(folder / name) for folder in (one, other))
        if mine["weights"].keys() != its["weights"].keys():
            return f"{name}: other weights"
        for key, value in mine["weights"].items():
            if not torch.equal(value, its["weights"][key]):
                return f"{name}: {key} differs by up to {(value.double() - its['weights'][key].double()).abs().max()}"
    left, right = _files(one), _files(other)
    return f"files: {sorted(left ^ right)} in one of them alone" if left != right else ""


def _files(folder: Path) -> set[str]:
    """What a run leaves; a kill between the last periodic checkpoint and its pruning leaves one more of these."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "_step_" not in path.name}


def assert_same_end(whole: Path, run: Path, kind: str, story: Sequence[str] = ()) -> None:
    """Fail with the first difference and what was done to ``run`` before it."""
    found = difference(whole, run, kind)
    told = "\n".join(f"  {number}. {line}" for number, line in enumerate(story, 1))
    assert not found, f"{whole} (undisturbed) and {run} differ:\n{found}\nafter\n{told}"
