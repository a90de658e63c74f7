"""Heads that begin with a task do it before any training, and let a Thinker learn to repeat within a few steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import omni.models.thinker as thinker_module
from omni.models.layers import Block, rotate
from omni.models.thinker import Thinker, ThinkerConfig


def make(num_kv_heads: int = 6, num_layers: int = 4) -> Thinker:
    torch.manual_seed(0)
    shape = {"dim": 128, "num_heads": 6, "head_dim": 64, "hidden_dim": 128, "num_layers": num_layers}
    return Thinker(ThinkerConfig(ctx_len=64, vocab_size=512, num_kv_heads=num_kv_heads, **shape))


@torch.no_grad()
def weights(model: Thinker, layer: int, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Attention [B, H, T, T] of a layer, computed here from its projections."""
    states_BTD = model(model.embed(tokens_BT), states_of=[layer]).hidden_states[layer]
    block = model.layers[layer]
    assert isinstance(block, Block)
    attention, (B, T, _) = block.self_attn, states_BTD.shape
    x, positions = block.input_layernorm(states_BTD), torch.arange(T)[None]
    q = attention.q_norm(attention.q_proj(x).view(B, T, attention.num_heads, -1))
    k = attention.k_norm(attention.k_proj(x).view(B, T, attention.num_kv_heads, -1))
    q, k = (rotate(part, *model.rotary(positions)).transpose(1, 2) for part in (q, k))
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / math.sqrt(attention.head_dim)
    return scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


def mean_weight(weights_BTT: torch.Tensor, distance: int, start: int) -> float:
    """How much positions from ``start`` on look at the one ``distance`` before them."""
    return float(weights_BTT.diagonal(-distance, 1, 2)[:, start - distance :].mean())


@pytest.mark.parametrize("num_kv_heads", [6, 3, 2, 1])
def test_heads_of_the_first_layer_look_back(num_kv_heads: int) -> None:
    found_BHTT = weights(make(num_kv_heads), 0, torch.randint(512, (8, 60)))
    for head, distance in enumerate((1, 2, 3, 5, 4, 6)):
        assert mean_weight(found_BHTT[:, head], distance, 10) > 0.6
        assert mean_weight(found_BHTT[:, head], distance + 1, 10) < 0.2


def test_heads_of_the_second_layer_find_what_followed() -> None:
    tokens_BT = torch.stack([torch.randperm(512)[:20] for _ in range(16)]).repeat(1, 2)
    found_BHTT = weights(make(), 1, tokens_BT)
    for head in (0, 1, 2):
        others = [mean_weight(found_BHTT[:, head], distance, 21) for distance in range(19)]
        assert mean_weight(found_BHTT[:, head], 19, 21) > 2.5 * max(others)  # six codes share 128 numbers


@torch.no_grad()
def test_what_stood_beside_a_word_is_said_where_the_word_is_said_again() -> None:
    """Words in a row, then some of them in another order: the logits of the untrained model, after two layers."""
    words_BT, order = torch.stack([torch.randperm(512)[:20] for _ in range(64)]), torch.randperm(10) + 5
    model = make()
    states_BTD = model(model.embed(torch.cat([words_BT, words_BT[:, order]], 1)), states_of=[2]).hidden_states[2]
    logits_BTV = model.logits(model.norm(states_BTD[:, 20:]))
    for offset in (-4, -1, 1, 4):  # of the 512 words, how many have a lower logit than the one that stood there
        beside_BT1 = logits_BTV.gather(2, words_BT[:, order + offset][..., None])
        assert (beside_BT1 > logits_BTV).float().mean() > 0.57
    elsewhere_BT1 = logits_BTV.gather(2, torch.randint(512, words_BT[:, order].shape)[..., None])
    assert (elsewhere_BT1 > logits_BTV).float().mean() < 0.53


def test_small_shapes_are_possible() -> None:
    for layers, heads, kv_heads in ((1, 1, 1), (2, 2, 1), (3, 4, 2)):
        shape = {"dim": 8 * heads, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "hidden_dim": 16}
        model = Thinker(ThinkerConfig(ctx_len=8, vocab_size=16, **shape))
        assert model(model.embed(torch.tensor([[1, 2, 3]]))).final_BTD.isfinite().all()


def accuracy_after(model: Thinker, steps: int) -> float:
    """Share of the second half of random sequences, said twice, that is predicted after some steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, betas=(0.9, 0.98))
    right = 0.0
    for step in range(steps):
        tokens_BT = torch.randint(512, (16, 24)).repeat(1, 2)
        logits_NV = model.logits(model(model.embed(tokens_BT)).final_BTD[:, 24:-1]).flatten(0, 1)
        targets_N = tokens_BT[:, 25:].flatten()
        for group in optimizer.param_groups:
            group["lr"] = 0.003 * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        F.cross_entropy(logits_NV, targets_N).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = float((logits_NV.argmax(-1) == targets_N).float().mean())
    return right


def test_repetition_is_learned_within_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accuracy_after(make(), 50) > 0.6
    monkeypatch.setattr(thinker_module, "start_with_tasks", lambda *args: None)
    assert accuracy_after(make(), 50) < 0.3
