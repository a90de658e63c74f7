"""The recognizer writes the most probable text, all of its CTC paths together."""

from __future__ import annotations

import itertools
import math

import torch

from omni.models.audio_encoder import prefix_search


def test_prefix_search_finds_the_most_probable_text_over_all_paths() -> None:
    torch.manual_seed(0)
    differs = 0
    for _ in range(40):
        log_probs_SV = torch.randn(6, 3).mul(1.5).log_softmax(-1)
        sums: dict[tuple[int, ...], float] = {}
        for path in itertools.product(range(3), repeat=6):
            text = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)
            chance = math.exp(sum(float(log_probs_SV[step, symbol]) for step, symbol in enumerate(path)))
            sums[text] = sums.get(text, 0.0) + chance
        best = max(sums, key=lambda text: sums[text])
        assert tuple(prefix_search(log_probs_SV, beam=64, least=1e-9)) == best
        single = tuple(symbol for symbol, _ in itertools.groupby(log_probs_SV.argmax(-1).tolist()) if symbol)
        differs += single != best
    assert differs > 0  # else the best single path would do


def test_prefix_search_of_a_certain_path_is_that_path() -> None:
    log_probs_SV = torch.full((5, 4), -20.0)
    for step, symbol in enumerate((1, 1, 0, 1, 3)):
        log_probs_SV[step, symbol] = 0.0
    assert prefix_search(log_probs_SV, beam=4) == [1, 1, 3]
    assert prefix_search(log_probs_SV[:0], beam=4) == []
