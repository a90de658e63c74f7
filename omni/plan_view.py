"""A plan for people. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from omni.plan_types import GIB, MOST, PhasePlan, Plan


def plan_text(plan: Plan, kinds: Sequence[str] = ("cuda", "cpu")) -> str:
    """A plan as a table for a terminal."""
    lines = [plan.name + (f", {plan.gpus} GPUs" if plan.gpus > 1 else "")]
    for phase in plan.phases:
        lines += [f"  {line}" for line in _phase_lines(plan, phase, kinds)]
    if "cpu" in kinds:
        caches = "unknown, the data are not there" if plan.caches is None else size_text(plan.caches)
        lines.append(f"  data kept in the main memory: {caches}")
    return "\n".join(lines)


def _phase_lines(plan: Plan, phase: PhasePlan, kinds: Sequence[str]) -> Iterator[str]:
    config, cost = phase.config, phase.cost
    rows = f"{config.gradient_accumulation_steps} x {config.batch_size}"
    yield (
        f"phase {cost.name}: {cost.cpu[0].trained / 1e6:.2f} M trained parameters, {config.max_steps} steps of {rows}, "
        f"{phase.flops() / 1e12:.3g} TFLOP a step"
    )
    for kind in kinds:
        parts = phase.parts(kind, plan.rows(phase), plan.gpus)
        if kind == "cpu":
            parts = parts | {"program": cost.program} | ({"data": plan.caches} if plan.caches else {})
        shown = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
        yield f"  {'CUDA' if kind == 'cuda' else 'CPU '} {size_text(plan.peak(phase, kind)):>9} at the most: {shown}"
    if "cuda" in kinds:
        fits = "yes" if plan.fits(phase) else "NO"
        best = plan.largest_batch(phase)
        most = f"{best} or more" if best >= MOST * plan.gpus else str(best)
        yield f"  fits {plan.memory / GIB:g} GB: {fits}; largest batch that fits: {most}"
    if cost.seconds:
        best_case = f", on {plan.gpus} such devices if none ever waits" if plan.gpus > 1 else ""
        yield (
            f"  {cost.seconds:.3g} s a step on {cost.device}: {plan.hours(phase):.3g} hours of computing{best_case}, "
            f"{phase.flops() / cost.seconds / 1e12:.3g} TFLOP/s"
        )


def size_text(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GB" if size >= GIB else f"{size / 2**20:.0f} MB"
