"""What a checkpoint does, for `omni inspect`: its samples, and the way through its projectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.config import UserError
from omni.evaluate.samples import Shown, make_samples
from omni.inspection.plain import without_nan
from omni.inspection.runs import Inspection, RunRecord
from omni.inspection.text import position, printable
from omni.inspection.trace import Trace, as_text, trace_checkpoint, trace_picture
from omni.page import plain_section, sample_sections
from omni.sample import Sample, samples_text

_COUNT = 2


@dataclass
class Doing:
    """What the model of one run does; ``problem`` says why nothing is shown."""

    title: str
    samples: list[Sample] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class ShownRuns:
    """What all of them do."""

    runs: Sequence[Doing]

    @property
    def text(self) -> str:
        """For a terminal, where pictures and sounds have no place."""
        parts = []
        for item in self.runs:
            words = [samples_text(item.samples, files=False), as_text(item.traces), item.problem]
            parts.append("\n\n".join([f"what {item.title} does with held-out data", *filter(None, words)]))
        return printable("\n\n".join(parts))

    @property
    def values(self) -> dict[str, Any]:
        """Plain values; the files of samples are gone by then, their words are not."""
        runs = [
            {"checkpoint": item.title, "problem": item.problem,
             "samples": [{"title": s.title, "texts": s.texts, "pieces": s.pieces, "right": s.right}
                         for s in item.samples],
             "trace": [trace.to_dict() for trace in item.traces]}
            for item in self.runs
        ]  # fmt: skip
        return dict(without_nan({"does": runs}))

    def page_parts(self) -> list[str]:
        """Pieces of a page, to be made while the files are there."""
        parts = []
        for item in self.runs:
            parts.append(plain_section(f"What {item.title} does with held-out data", item.problem))
            parts.append(sample_sections(item.samples))
            if item.traces:
                parts.append(plain_section("Through the projectors", as_text(item.traces)))
        return parts


def show(found: Inspection, folder: Path, samples: bool, trace: bool) -> ShownRuns:
    """Load the models of an inspection, and show what they do.

    Args:
        found: what is looked at.
        folder: for pictures and sounds.
        samples: what they do with held-out data.
        trace: a sample's way through the projectors of stage E, as text too.

    Raises:
        UserError: when a trace is wanted of what has no projectors.
    """
    runs = [run for run in found.runs if run.shown is not None]
    if trace and not any(_has_projectors(run) for run in runs):
        raise UserError(f"{found.path}: found no checkpoint of stage E, expected an omni.pt for --trace")
    return ShownRuns([_doing(run, folder / str(number), samples, trace) for number, run in enumerate(runs)])


def _has_projectors(run: RunRecord) -> bool:
    return run.shown is not None and run.shown.facts.kind == "omni"


def _doing(run: RunRecord, folder: Path, samples: bool, trace: bool) -> Doing:
    """One run; what is missing for it is a sentence, since there may be others."""
    assert run.shown is not None
    path = run.shown.path
    doing = Doing(f"{path} ({position(run.shown)})")
    try:
        if samples:
            doing.samples = make_samples(Shown(path, folder, _COUNT))
        if _has_projectors(run):
            traces = trace_checkpoint(path)
            folder.mkdir(parents=True, exist_ok=True)
            doing.samples += [trace_picture(item, folder) for item in traces] if samples else []
            doing.traces = traces if trace else []
    except (UserError, OSError) as error:
        doing.problem = f"cannot be shown: {error}"
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # a summary of another version or of no stage's, weights that do not fit it: the facts stand all the same
        doing.problem = f"cannot be shown: its summary or weights are not a stage's ({type(error).__name__}: {error})"
    return doing
