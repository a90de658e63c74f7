"""The recognizer writes the most probable text, all of its CTC paths together."""

from __future__ import annotations

import itertools
import math

import torch

from omni.models.ctc import prefix_search


def test_prefix_search_finds_the_most_probable_text_over_all_paths() -> None:
    torch.manual_seed(0)
    differs = fewer = 0
    for _ in range(40):
        log_probs_SV = torch.randn(6, 3).mul(1.5).log_softmax(-1)
        sums: dict[tuple[int, ...], float] = {}
        for path in itertools.product(range(3), repeat=6):
            text = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)
            chance = math.exp(sum(float(log_probs_SV[step, symbol]) for step, symbol in enumerate(path)))
            sums[text] = sums.get(text, 0.0) + chance
        best = max(sums, key=lambda text: sums[text])
        found = prefix_search(log_probs_SV, beam=64, least=1e-9)
        assert tuple(found[0][0]) == best
        blank_V = torch.tensor([0.0, -60.0, -60.0])  # between all steps, so that no symbol goes on
        apart = prefix_search(torch.cat([log_probs_SV[:3], blank_V[None], log_probs_SV[3:]]), beam=64, least=1e-9)
        halves = [prefix_search(half, beam=64, least=1e-9) for half in log_probs_SV.split(3)]
        joined: dict[tuple[int, ...], float] = {}
        for (one, p), (other, q) in itertools.product(*halves):
            joined[(*one, *other)] = joined.get((*one, *other), 0.0) + math.exp(p + q)
        assert len(apart) == len(joined)
        for symbols, log_prob in apart:
            assert math.isclose(math.exp(log_prob), joined[tuple(symbols)], rel_tol=1e-4)
        for symbols, log_prob in found:
            assert math.isclose(math.exp(log_prob), sums[tuple(symbols)], rel_tol=1e-4)
        near = prefix_search(log_probs_SV, beam=64, least=1e-9, margin=4.0)
        assert near[0][0] == found[0][0] and all(log_prob >= near[0][1] - 4.0 for _, log_prob in near)
        fewer += len(near) < len(found)
        single = tuple(symbol for symbol, _ in itertools.groupby(log_probs_SV.argmax(-1).tolist()) if symbol)
        differs += single != best
    assert fewer > 0
    assert differs > 0  # else the best single path would do


def test_prefix_search_of_a_certain_path_is_that_path() -> None:
    log_probs_SV = torch.full((5, 4), -20.0)
    for step, symbol in enumerate((1, 1, 0, 1, 3)):
        log_probs_SV[step, symbol] = 0.0
    assert prefix_search(log_probs_SV, beam=4) == [([1, 1, 3], 0.0)]
    assert prefix_search(log_probs_SV[:0], beam=4) == [([], 0.0)]
