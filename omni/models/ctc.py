"""CTC: the loss, and the search for the most probable texts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def ctc_sum(
    log_probs_NSV: torch.Tensor, targets_NT: torch.Tensor, num_steps_N: torch.Tensor, num_targets_N: torch.Tensor
) -> torch.Tensor:
    """CTC loss (Graves et al., 2006) summed over the batch; symbol 0 is the blank.

    CUDA's gradient of it adds up in any order. Where a run shall repeat bit for bit, it is computed on the CPU.
    """
    device = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else log_probs_NSV.device
    return F.ctc_loss(
        log_probs_NSV.transpose(0, 1).to(device),
        targets_NT.to(device),
        num_steps_N.to(device),
        num_targets_N.to(device),
        blank=0,
        reduction="sum",
    ).to(log_probs_NSV.device)


_MOST_SYMBOLS = 16  # considered at a step of the search
_NEVER = -math.inf


def prefix_search(
    log_probs_SV: torch.Tensor, beam: int, least: float = 1e-3, margin: float = math.inf
) -> list[tuple[list[int], float]]:
    """Search the symbols with the highest sums over all their CTC paths (Graves et al., 2006; Hannun et al., 2014).

    Args:
        log_probs_SV: log-probabilities of each step; symbol 0 is blank.
        beam: prefixes kept after each step.
        least: symbols of a lower probability are passed over at a step, but for the best one.
        margin: prefixes whose log-probability is this much lower than the best one's are not kept either.

    Returns:
        Symbols and their log-probability, the most probable first.
    """
    # of each prefix the log-probability of the paths that end in blank, and of those that end in its last symbol
    prefixes: dict[tuple[int, ...], list[float]] = {(): [0.0, _NEVER]}
    likely = log_probs_SV.topk(min(_MOST_SYMBOLS, log_probs_SV.shape[1]))
    for indices, values in zip(likely.indices.tolist(), likely.values.tolist(), strict=True):
        pairs = list(zip(indices, values, strict=True))
        kept = [pair for pair in pairs if pair[1] > math.log(least)] or pairs[:1]
        if [index for index, _ in kept] == [0]:  # surely blank: no prefix grows, and their order stays
            for ends in prefixes.values():
                ends[:] = _log_sum(*ends) + kept[0][1], _NEVER
            continue
        found: dict[tuple[int, ...], list[float]] = {}
        for prefix, (blank, symbol) in prefixes.items():
            both = _log_sum(blank, symbol)
            for index, log_prob in kept:
                if index == 0:
                    _add(found, prefix, 0, both + log_prob)
                elif prefix and prefix[-1] == index:  # the same symbol goes on, or comes again after a blank
                    _add(found, prefix, 1, symbol + log_prob)
                    _add(found, (*prefix, index), 1, blank + log_prob)
                else:
                    _add(found, (*prefix, index), 1, both + log_prob)
        ranked = sorted(((_log_sum(*ends), prefix) for prefix, ends in found.items()), key=lambda item: -item[0])
        prefixes = {prefix: found[prefix] for score, prefix in ranked[:beam] if score >= ranked[0][0] - margin}
    return [(list(prefix), _log_sum(*ends)) for prefix, ends in prefixes.items()]


def _add(found: dict[tuple[int, ...], list[float]], prefix: tuple[int, ...], end: int, log_prob: float) -> None:
    """Add paths to a prefix, if there are any; `end` is 0 if they end in blank."""
    if log_prob > _NEVER:
        ends = found.setdefault(prefix, [_NEVER, _NEVER])
        ends[end] = _log_sum(ends[end], log_prob)


def _log_sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == _NEVER else high + math.log1p(math.exp(low - high))
