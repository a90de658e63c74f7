"""The raw predictions behind the figures of `omni eval`, case by case, as JSON lines. Needs no torch.

The first lines name the test sets: ``{"set": path, "sha256": ..., "media": ..., "media_bytes": ...}``. Every other line
is what the model did with one case, for one figure: ``{"stage", "figure", "case": "file:line", ...}`` with the raw
values, and with ``part`` and ``whole`` where the figure is the sum of all parts over the sum of all wholes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.atomic import write_whole
from omni.config import UserError

Sets = dict[str, dict[str, Any]]  # by path: the fingerprint of omni.lineage.data_fingerprint


@dataclass
class Predictions:
    """What was predicted, and on what.

    Attributes:
        sets: the fingerprint of every test set by its path.
        lines: one a figure and case.
    """

    sets: Sets = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, stage: str, figure: str, cases: Iterable[dict[str, Any]]) -> None:
        """Add the cases of a figure."""
        self.lines += [{"stage": stage, "figure": figure, **case} for case in cases]

    def scores(self) -> dict[str, dict[tuple[str, str], tuple[float, float]]]:
        """Part and whole of each case of every ratio ``stage.figure``, by what tells cases apart.

        That is the fingerprint of the set and the place in it, wherever the set stands; a set that is not known counts
        as another one each time.
        """
        found: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
        for line in self.lines:
            path = next((name for name in self.sets if line["case"].startswith(f"{name}:")), None)
            if "part" in line and path is not None:
                key = (str(self.sets[path]["sha256"]), line["case"].removeprefix(path))
                scores = found.setdefault(f"{line['stage']}.{line['figure']}", {})
                scores[key] = (float(line["part"]), float(line["whole"]))
        return found

    def write(self, path: Path) -> None:
        """Write them whole."""
        heads = [{"set": name, **fingerprint} for name, fingerprint in self.sets.items()]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in [*heads, *self.lines]).encode())


def read_predictions(path: Path) -> Predictions:
    """What :meth:`Predictions.write` wrote.

    Raises:
        UserError: when it is anything else.
    """
    found = Predictions()
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if "set" in values:
                name = str(values.pop("set"))
                found.sets[name] = {**values, "sha256": str(values["sha256"])}
            else:
                found.lines.append({**values, **{key: str(values[key]) for key in ("stage", "figure", "case")}})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: found no predictions ({type(error).__name__}: {error}), expected what "
            "`omni eval --predictions FILE` writes"
        ) from None
    return found


def predictions_beside(figures: Path) -> Path:
    """Where `omni compare` looks for the predictions behind ``eval.json``: ``eval.predictions.jsonl``."""
    return figures.with_name(f"{figures.stem}.predictions.jsonl")
