"""One sample's way through a projector, step by step: is what leaves it what the Thinker can read?

What an encoder perceives enters the Thinker beside token embeddings, so it should look like one: of the same size, its
dimensions alive. Each step's shape and spread is shown, before training and after it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni.config import UserError, data_rules
from omni.data.dialogue import read_chats
from omni.evaluate.sample_media import label, new_figure, save_figure
from omni.features import FeatureStore
from omni.load import load_omni
from omni.models.omni import OmniModel
from omni.models.projector import (
    Projector,
    ProjectorConfig,
    build_projector,
    match_rms,
    num_stacked,
    stack_patches,
    stack_states,
)
from omni.sample import Sample
from omni.summary import read_summary

STACKS = (2, 3, 5, 8, 10)
_BINS = 24


@dataclass(frozen=True)
class Spread:
    """How the values of a tensor are spread; ``edges`` are those of the bins that ``counts`` are of."""

    shape: list[int]
    mean: float
    std: float
    min: float
    max: float
    rms: float
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Stacking:
    """What a projector with another number of stacked states would be."""

    stack: int
    positions: int  # that this sample would take
    parameters: int


@dataclass(frozen=True)
class Trace:
    """One sample's way through one projector.

    Attributes:
        modality: image or audio.
        source: the picture or recording.
        kind: of the projector.
        stack: states a position.
        parameters: of the projector.
        before: the spread of every step, in order, for a projector as training begins with it.
        after: the same for the projector as it is.
        embeddings: the spread of the Thinker's token embeddings.
        variances: of each dimension of what enters the Thinker (the last step), over the positions of the sample.
        embedding_variances: of each dimension of the token embeddings, over the vocabulary.
        stackings: the same projector for other numbers of stacked states.
    """

    modality: str
    source: str
    kind: str
    stack: int
    parameters: int
    before: dict[str, Spread]
    after: dict[str, Spread]
    embeddings: Spread
    variances: list[float]
    embedding_variances: list[float]
    stackings: list[Stacking]

    @property
    def entering(self) -> str:
        """The last step: what enters the Thinker."""
        return list(self.after)[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def trace_checkpoint(checkpoint: str | Path, manifest: str | None = None) -> list[Trace]:
    """Trace the first picture and the first recording of a set of chats through the projectors of an ``omni.pt``.

    Args:
        checkpoint: stage E's.
        manifest: chats; by default those that the checkpoint's configuration names as ``data.test`` or ``data.val``.

    Raises:
        UserError: when the checkpoint or the chats cannot be read, or these hold no picture and no recording.
    """
    model, tokenizer = load_omni(checkpoint)
    data = read_summary(checkpoint)["config"]["data"]
    manifest = manifest or data["test"] or data["val"]
    chats = read_chats(manifest, data_rules(data, str(checkpoint)))
    first = {kind: [path for chat in chats for path in chat.paths(kind)][:1] for kind in ("image", "audio")}
    if not any(first.values()):
        raise UserError(f"{manifest}: found chats of text alone, expected a picture or a recording to trace")
    features = FeatureStore(model, tokenizer)
    features.add(first["image"], first["audio"])
    traces = [trace_image(model, features.image(path), path) for path in first["image"]]
    return traces + [trace_audio(model, features.audio(path), path) for path in first["audio"]]


def trace_image(model: OmniModel, patches_PD: torch.Tensor, source: str) -> Trace:
    """Trace a picture's patch tokens; see :class:`Trace`."""
    config, (num_patches, dim) = model.config.image_projector, patches_PD.shape
    stackings = [Stacking(k, num_stacked(num_patches, k), _size(model, dim, config, k)) for k in STACKS]
    stacked = stack_patches(patches_PD[None], config.stack)[0]
    return _trace(model, "image", source, config, model.image_projector, stacked, dim, stackings)


def trace_audio(model: OmniModel, states_TD: torch.Tensor, source: str) -> Trace:
    """Trace a recording's encoder states; see :class:`Trace`."""
    config, (num_states, dim) = model.config.audio_projector, states_TD.shape
    stackings = [Stacking(k, -(-num_states // k), _size(model, dim, config, k)) for k in STACKS]
    stacked = stack_states(states_TD[None], config.stack, config.context)[0]
    return _trace(model, "audio", source, config, model.audio_projector, stacked, dim, stackings)


@torch.no_grad()
def _trace(
    model: OmniModel,
    modality: str,
    source: str,
    config: ProjectorConfig,
    projector: Projector,
    stacked: torch.Tensor,
    dim: int,
    stackings: list[Stacking],
) -> Trace:
    embeddings_VD = model.thinker.embed_tokens.weight
    stacked = stacked.to(embeddings_VD.device)
    with torch.random.fork_rng(devices=[]):  # other random weights than training began with, but drawn alike
        torch.manual_seed(0)
        new = build_projector(dim, embeddings_VD.shape[1], config)
    match_rms(new, embeddings_VD)
    after = projector.walk(stacked)
    return Trace(
        modality,
        source,
        config.kind,
        config.stack,
        _num_parameters(projector),
        {name: spread(x) for name, x in new.to(stacked.device).walk(stacked).items()},
        {name: spread(x) for name, x in after.items()},
        spread(embeddings_VD),
        _variances(list(after.values())[-1]),
        _variances(embeddings_VD),
        stackings,
    )


def spread(x: torch.Tensor) -> Spread:
    """The spread of a tensor's values; its histogram reaches from the smallest to the largest."""
    values = x.detach().float().flatten().cpu()
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, _BINS, low, high) if high > low else torch.tensor([len(values)] + [0] * (_BINS - 1))
    return Spread(
        list(x.shape),
        float(values.mean()),
        float(values.std(correction=0)),
        low,
        high,
        float(values.square().mean().sqrt()),
        torch.linspace(low, high, _BINS + 1).tolist(),
        counts.long().tolist(),
    )


def _variances(x_ND: torch.Tensor) -> list[float]:
    return x_ND.detach().float().var(dim=0, correction=0).tolist()


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size(model: OmniModel, dim: int, config: ProjectorConfig, stack: int) -> int:
    """Parameters of a projector that stacks ``stack`` states; nothing is computed."""
    with torch.device("meta"):
        return _num_parameters(build_projector(dim, model.config.thinker.dim, dataclasses.replace(config, stack=stack)))


def as_text(traces: Sequence[Trace]) -> str:
    """Traces as a page of text."""
    return "\n\n".join("\n".join(_lines(trace)) for trace in traces)


def _lines(trace: Trace) -> list[str]:
    lines = [
        f"{trace.modality} projector: {trace.kind}, {trace.stack} states a position, {trace.parameters:,} parameters",
        f"sample: {trace.source}",
        f"{'':<24}{'shape':>12}{'mean':>9}{'std':>9}{'min':>9}{'max':>9}{'rms':>9}  from min to max",
    ]
    for name, after in trace.after.items():
        lines += [_line(f"{name}, before training", trace.before[name]), _line(f"{name}, now", after)]
    lines.append(_line("token embeddings", trace.embeddings))
    for name, values in ((trace.entering, trace.variances), ("embeddings", trace.embedding_variances)):
        ordered = sorted(values)
        median = ordered[len(ordered) // 2]
        dead = sum(value < 0.01 * median for value in values)
        lines.append(
            f"variance of each of {len(values)} dimensions of {name}: min {ordered[0]:.3g}, median {median:.3g}, "
            f"max {ordered[-1]:.3g}; {dead} below a hundredth of the median"
        )
    lines.append("other stacks:   k   positions   parameters")
    lines += [f"{each.stack:>17}{each.positions:>12}{each.parameters:>13,}" for each in trace.stackings]
    return lines


_BLOCKS = " ▁▂▃▄▅▆▇█"


def _line(name: str, found: Spread) -> str:
    most = max(found.counts)
    bars = "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // most)] for count in found.counts)
    numbers = "".join(f"{value:>9.3g}" for value in (found.mean, found.std, found.min, found.max, found.rms))
    return f"{name:<24}{' x '.join(map(str, found.shape)):>12}{numbers}  |{bars}|"


def trace_picture(trace: Trace, folder: Path) -> Sample:
    """What leaves a projector, before training and now, beside the token embeddings: values, and each dimension."""
    figure = new_figure(2.6)
    left, right = figure.subplots(1, 2)
    spreads = (
        ("before training", trace.before[trace.entering]), ("now", trace.after[trace.entering]),
        ("token embeddings", trace.embeddings),
    )  # fmt: skip
    for name, found in spreads:
        total, sides = sum(found.counts), itertools.pairwise(found.edges)
        density = [n / (total * (b - a)) if b > a else 0.0 for n, (a, b) in zip(found.counts, sides, strict=True)]
        left.stairs(density, found.edges, label=name)
    label(left, f"{trace.modality}: values", "density")
    left.legend(fontsize=6)
    for name, values in (("now", trace.variances), ("token embeddings", trace.embedding_variances)):
        right.plot(sorted(values, reverse=True), label=name)
    right.set_yscale("log")
    label(right, "variance of each dimension", x="dimensions, the largest first")
    right.legend(fontsize=6)
    picture = save_figure(figure, folder / f"projector_{trace.modality}.jpg")
    now = trace.after[trace.entering]
    texts = (
        ("sample", trace.source),
        ("projector", f"{trace.kind}, {trace.stack} states a position, {trace.parameters:,} parameters"),
        ("size (RMS)", f"{now.rms:.3g}; token embeddings {trace.embeddings.rms:.3g}"),
    )
    return Sample(f"what the {trace.modality} projector gives the Thinker", texts, (("beside embeddings", picture),))
