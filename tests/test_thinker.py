"""The Thinker: decoding step by step gives what one pass gives, and every parameter learns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from omni import losses
from omni.losses import next_token_loss_sum
from omni.models.kv_cache import KVCache
from omni.models.thinker import Thinker, ThinkerConfig
from omni.tokenizer import IGNORE

CONFIG = ThinkerConfig(ctx_len=32, vocab_size=50, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=48)


@pytest.fixture
def thinker() -> Thinker:
    torch.manual_seed(0)
    model = Thinker(CONFIG).eval()
    with torch.no_grad():  # larger weights than at the start, so that a wrong mask or position shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    return model


@pytest.fixture(name="tokens_BT")
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunks", [[1] * 17, [17], [5, 12], [9, 1, 1, 6], [1, 16]])
@torch.no_grad()
def test_cache_gives_the_states_of_one_pass(thinker: Thinker, tokens_BT: torch.Tensor, chunks: list[int]) -> None:
    whole = thinker(thinker.embed(tokens_BT), states_of=[0, 2, 3])
    cache, parts = KVCache(3), []
    for piece in tokens_BT.split(chunks, dim=1):
        parts.append(thinker(thinker.embed(piece), cache=cache, states_of=[0, 2, 3]))
    assert cache.length == 17
    assert torch.allclose(torch.cat([part.final_BTD for part in parts], 1), whole.final_BTD, atol=1e-5)
    for layer, states in whole.hidden_states.items():
        assert torch.allclose(torch.cat([part.hidden_states[layer] for part in parts], 1), states, atol=1e-5)


@torch.no_grad()
def test_left_padding_changes_nothing(thinker: Thinker, tokens_BT: torch.Tensor) -> None:
    """Rows of different lengths in one batch, decoded with a cache, as `omni.generate` does."""
    lengths, T = [17, 11, 4], 17
    valid_BT = torch.arange(T)[None] >= T - torch.tensor(lengths)[:, None]
    positions_BT = (valid_BT.cumsum(1) - 1).clamp(min=0)
    first = 14  # in one piece, the rest step by step
    seen = (torch.ones(T, T, dtype=torch.bool).tril() & valid_BT[:, None, :]) | torch.eye(T, dtype=torch.bool)
    cache, parts = KVCache(3), []
    for start, end in ((0, first), *((t, t + 1) for t in range(first, T))):
        x = thinker.embed(tokens_BT[:, start:end])
        mask = seen[:, None, start:end, :end]
        parts.append(thinker(x, positions_BT[:, start:end], mask, cache).final_BTD)
    batched = torch.cat(parts, 1)
    for row, length in enumerate(lengths):
        alone = thinker(thinker.embed(tokens_BT[row : row + 1, T - length :])).final_BTD[0]
        assert torch.allclose(batched[row, T - length :], alone, atol=1e-5)


@torch.no_grad()
def test_future_tokens_change_nothing(thinker: Thinker, tokens_BT: torch.Tensor) -> None:
    before = thinker(thinker.embed(tokens_BT)).final_BTD
    changed = tokens_BT.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 50
    after = thinker(thinker.embed(changed)).final_BTD
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


@torch.no_grad()
def test_order_matters(thinker: Thinker, tokens_BT: torch.Tensor) -> None:
    swapped = tokens_BT.clone()
    swapped[:, [2, 5]] = swapped[:, [5, 2]]
    states = [thinker(thinker.embed(tokens)).final_BTD[:, -1] for tokens in (tokens_BT, swapped)]
    assert not torch.allclose(*states, atol=1e-3)


def test_gradient_reaches_every_parameter(thinker: Thinker, tokens_BT: torch.Tensor) -> None:
    states = thinker(thinker.embed(tokens_BT[:, :-1])).final_BTD
    next_token_loss_sum(thinker, states, tokens_BT[:, 1:]).backward()
    for name, parameter in thinker.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_positions_without_a_label_count_for_nothing(thinker: Thinker, tokens_BT: torch.Tensor) -> None:
    states, labels = thinker(thinker.embed(tokens_BT)).final_BTD, tokens_BT.clone()
    labels[:, 5:] = IGNORE
    kept = next_token_loss_sum(thinker, states[:, :5], labels[:, :5])
    assert torch.allclose(next_token_loss_sum(thinker, states, labels), kept)


def test_loss_of_a_new_model_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    model, tokens = Thinker(CONFIG), torch.randint(0, 50, (4, 32))
    loss = next_token_loss_sum(model, model(model.embed(tokens)).final_BTD, tokens.roll(-1, 1)) / tokens.numel()
    assert abs(loss.item() - math.log(50)) < 0.5


def test_logits_that_are_not_finite_are_refused(thinker: Thinker) -> None:
    with pytest.raises(FloatingPointError, match="logits"):
        thinker.logits(torch.full((1, 32), float("nan")))


@pytest.mark.parametrize(("key", "value"), [("num_heads", 5), ("num_heads", 32), ("num_kv_heads", 3)])
def test_impossible_shapes_are_problems(key: str, value: int) -> None:
    assert list(dataclasses.replace(CONFIG, **{key: value}).problems())
    assert not list(CONFIG.problems())


def test_cross_entropy_in_chunks_equals_that_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(losses, "_CHUNK", 7 * 40)  # seven rows at a time, of 25
    x, weight = torch.randn(25, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    labels = torch.randint(40, (25,))
    labels[[3, 24]] = IGNORE
    chunked = losses.linear_cross_entropy(x, weight, labels)
    whole = F.cross_entropy(x @ weight.T, labels, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(chunked, whole)
    factors = torch.rand(25)
    found = torch.autograd.grad((chunked * factors).sum(), [x, weight])
    for a, b in zip(found, torch.autograd.grad((whole * factors).sum(), [x, weight]), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(FloatingPointError):
        losses.linear_cross_entropy(x * float("inf"), weight, labels)
    assert losses.linear_cross_entropy(x[:0], weight, labels[:0]).sum() == 0
