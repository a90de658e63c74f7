"""What a checkpoint was made from, and whether those files are still the ones on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.config import UserError, short_json
from omni.files import file_problem
from omni.inspection.facts import CheckpointFile, read_checkpoint

# the checkpoints that a stage is built on: their names in a lineage, and the keys of the configuration with their paths
_INPUTS = {"thinker": "thinker_ckpt", "audio_enc": "audio_ckpt", "vision": "vision_ckpt", "talker": "talker_ckpt"}
_DEEPEST = 8  # stages one upon the other; there are three


@dataclass
class Ancestor:
    """A checkpoint, or an input of one.

    Attributes:
        kind: of the checkpoint: thinker, audio_enc, ...
        sha256: of its contents, as it was when it was used.
        path: where it stands, or stood.
        state: same, another file, missing, or what is wrong with the file there; "" for the root.
        now: the checksum of what stands there today, where it is another.
        data: what of the data and the tokenizer was recorded, as ``(name, text)``.
        inputs: what it was made from itself; known only where the file is the same.
    """

    kind: str
    sha256: str
    path: Path | None
    state: str = ""
    now: str = ""
    data: list[tuple[str, str]] = field(default_factory=list)
    inputs: list[Ancestor] = field(default_factory=list)


def ancestry(checkpoint: CheckpointFile, known: Sequence[CheckpointFile] = (), depth: int = 0) -> Ancestor:
    """The tree of what a checkpoint was made from.

    Args:
        checkpoint: its root.
        known: other checkpoints among which an input that has moved is found by its checksum.
        depth: of this root in a larger tree.
    """
    facts = checkpoint.facts
    root = Ancestor(facts.kind, facts.sha256, checkpoint.path, data=_data(facts.lineage))
    for kind, key in _INPUTS.items():
        recorded, path = facts.lineage.get(kind), facts.config.get(key)
        if isinstance(recorded, str) and depth < _DEEPEST:
            where = path if isinstance(path, str) else None
            root.inputs.append(_input(kind, recorded, where, checkpoint, known, depth + 1))
    return root


def _input(
    kind: str, recorded: str, path: str | None, child: CheckpointFile, known: Sequence[CheckpointFile], depth: int
) -> Ancestor:
    node = Ancestor(kind, recorded, Path(path) if path else None, "missing")
    for place in _places(path, child) if path else ():
        try:
            found = read_checkpoint(place)
        except UserError as error:
            node.path, node.state = place, str(error).removeprefix(f"{place}: ")
            continue
        if found.facts.sha256 == recorded:
            return _same(found, known, depth)
        node.path, node.state, node.now = place, "another file", found.facts.sha256
    moved = next((item for item in known if item.facts.sha256 == recorded), None)
    return _same(moved, known, depth) if moved else node


def _same(found: CheckpointFile, known: Sequence[CheckpointFile], depth: int) -> Ancestor:
    node = ancestry(found, known, depth)
    node.state = "same"
    return node


def _places(path: str, child: CheckpointFile) -> Iterator[Path]:
    """Where an input may stand: as the configuration has it, or beside the run when all of them were moved."""
    here, beside = Path(path), child.path.absolute().parent.parent / Path(*Path(path).parts[-2:])
    yield from (place for place in dict.fromkeys((here, beside)) if file_problem(place) != "no such file")


def _data(lineage: dict[str, Any]) -> list[tuple[str, str]]:
    """The hashes of data and tokenizer, by their names."""
    found = []
    if isinstance(lineage.get("tokenizer"), str):
        found.append(("tokenizer", lineage["tokenizer"][:12]))
    data = lineage.get("data")
    parts = data.items() if isinstance(data, dict) else [("", data)] if data is not None else []
    for name, part in parts:
        if isinstance(part, dict) and isinstance(part.get("sha256"), str):
            media = part.get("media")
            text = part["sha256"][:12] + (f" ({media:,} files)" if isinstance(media, int) and media else "")
        else:
            text = short_json(part)
        found.append((f"data {name}".strip(), text))
    return found


def changed_inputs(root: Ancestor) -> list[Ancestor]:
    """The direct inputs that are not what they were: with them a resume is refused."""
    return [node for node in root.inputs if node.state != "same"]
