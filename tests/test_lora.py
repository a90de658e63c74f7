"""Low-rank adapters: a new one changes nothing, they alone are trained, merged they are the same model."""

import pytest
import torch

from omni.config import UserError
from omni.models.kv_cache import KVCache
from omni.models.layers import Block
from omni.models.lora import PROJECTIONS, AdaptedLinear, LoRAConfig, adapters, add_adapters, merged
from omni.models.thinker import Thinker, ThinkerConfig

SHAPE = ThinkerConfig(ctx_len=32, vocab_size=40, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=48)
TOKENS = torch.arange(12).view(2, 6)


def thinker(config=None):
    torch.manual_seed(0)
    made = Thinker(SHAPE).eval()
    if config is not None:
        add_adapters(made, config)
    return made


def logits(model):
    return model.logits(model(model.embed(TOKENS)).final_BTD)


def spoken(model):
    """Give the adapters values, as training does."""
    for part in adapters(model):
        torch.nn.init.normal_(part.b_proj.weight, std=0.1)
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_a_new_adapter_changes_nothing_bit_for_bit(autocast):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(logits(thinker()), logits(thinker(LoRAConfig(rank=4))))


def test_the_adapters_alone_have_gradients():
    model = spoken(thinker(LoRAConfig(rank=4)))
    model.requires_grad_(False)
    for part in adapters(model):
        part.requires_grad_(True)
    logits(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapter." in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("projections", [PROJECTIONS, ("q_proj", "v_proj"), ("down_proj",)])
def test_merged_is_unmerged(projections):
    model = spoken(thinker(LoRAConfig(rank=3, alpha=5.0, projections=projections)))
    assert len(adapters(model)) == 2 * len(projections)
    plain = Thinker(SHAPE).eval()
    plain.load_state_dict(merged(model, model.state_dict()))
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(plain) - logits(thinker())).abs().max() > 1e-2
    changed = {key for key, value in plain.state_dict().items() if not torch.equal(value, thinker().state_dict()[key])}
    assert {key.split(".")[-2] for key in changed} == set(projections)


def test_the_product_counts_alpha_over_rank():
    one, other = (AdaptedLinear(torch.nn.Linear(4, 6, bias=False), LoRAConfig(rank=2, alpha=a)) for a in (2.0, 6.0))
    other.load_state_dict(one.state_dict())
    torch.nn.init.ones_(one.adapter.b_proj.weight)
    torch.nn.init.ones_(other.adapter.b_proj.weight)
    torch.testing.assert_close(3 * one.adapter.matrix(), other.adapter.matrix())
    x = torch.randn(3, 4)
    torch.testing.assert_close(one.adapter(x), x @ one.adapter.matrix().T)


def test_step_by_step_decoding_is_one_pass_with_adapters():
    model = spoken(thinker(LoRAConfig(rank=4)))
    cache, rows = KVCache(SHAPE.num_layers), []
    with torch.no_grad():
        whole = model(model.embed(TOKENS)).final_BTD
        for position in range(TOKENS.shape[1]):
            rows.append(model(model.embed(TOKENS[:, position : position + 1]), cache=cache).final_BTD)
    torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-5, rtol=1e-5)


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(UserError, match=r"lora\.rank: found 9, expected at most 8, the width of self_attn"):
        add_adapters(Block(8, 2, 16, 0, causal=True), LoRAConfig(rank=9))
