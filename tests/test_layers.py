"""The shared layers: what is fast equals what is plain."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omni.config import RunConfig
from omni.models.kv_cache import KVCache
from omni.models.layers import Block, RMSNorm, RotaryPositions, TimeConv, attend, dropout, init_weights, rotate
from omni.models.lora import LoRAConfig, adapters, add_adapters
from omni.models.one_position import run_block
from omni.runtime import prepare_blocks
from omni.step_cost import LiveBytes
from tests.forked import Child


@pytest.mark.parametrize("width, groups, stride", [(8, 8, 1), (6, 1, 2)])
def test_time_convolution_equals_conv1d(width: int, groups: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = TimeConv(8, 24 if groups == 1 else 8, 5, stride=stride, padding=2, groups=groups)
    x = torch.randn(3, 11, 8, requires_grad=True)
    slow = F.conv1d(x.transpose(1, 2), conv.weight, conv.bias, stride, 2, groups=groups).transpose(1, 2)
    fast = conv(x)
    torch.testing.assert_close(fast, slow)
    assert fast.is_contiguous()
    direction = torch.randn_like(fast)
    inputs = [x, conv.weight, conv.bias]
    for a, b in zip(
        torch.autograd.grad(fast, inputs, direction), torch.autograd.grad(slow, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_dropout_keeps_the_mean_and_the_gradient_of_what_it_kept() -> None:
    torch.manual_seed(0)
    x = torch.ones(300, 333, requires_grad=True)
    y = dropout(x, 0.25, training=True)
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.01
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert dropout(x, 0.25, training=False) is x
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.25, training=True), y)  # random numbers of torch, which a checkpoint keeps


@pytest.mark.parametrize("kind", ["causal", "mask", "none"])
def test_plain_attention_equals_the_fused_kernel(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 12, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 12, 12) < 0.6
    mask |= torch.eye(12, dtype=torch.bool)
    mask = mask if kind == "mask" else None
    plain = attend(q, k, v, mask, causal=kind == "causal")
    single = [part.detach().float().requires_grad_() for part in (q, k, v)]
    fused = F.scaled_dot_product_attention(*single, attn_mask=mask, is_causal=kind == "causal")
    torch.testing.assert_close(plain.float(), fused, atol=0.02, rtol=0.02)
    direction = torch.randn_like(fused)
    found = torch.autograd.grad(plain, [q, k, v], direction.bfloat16())
    for a, b in zip(found, torch.autograd.grad(fused, single, direction), strict=True):
        torch.testing.assert_close(a.float(), b, atol=0.05, rtol=0.05)


def test_norm_on_the_cpu_equals_torchs() -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(12), torch.randn(3, 5, 12, requires_grad=True)
    torch.nn.init.normal_(norm.weight)
    found, plain = norm(x), F.rms_norm(x, (12,), norm.weight, norm.eps)
    torch.testing.assert_close(found, plain)
    direction = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(found, [x, norm.weight], direction),
        torch.autograd.grad(plain, [x, norm.weight], direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def narrow_convolution() -> None:
    torch.set_num_threads(1)
    conv = TimeConv(16, 16, 15, padding=7, groups=16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(1, 31, 16).bfloat16()
        same = torch.nn.functional.conv1d(x.float().mT, conv.weight, conv.bias, padding=7, groups=16)
        assert torch.allclose(conv(x).float().mT, same.float(), atol=0.02)


def test_narrow_depthwise_convolutions_return_in_bf16(tmp_path: Path) -> None:
    """In a process of its own: oneDNN's bf16 kernel would never return for this shape."""
    child = Child(narrow_convolution, (), tmp_path / "log.txt")
    assert child.wait(60) == 0, child.log.read_text()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["plain", "masked", "adapted"])
@torch.no_grad()
def test_a_block_at_one_position_equals_the_block(kv_heads: int, kind: str) -> None:
    torch.manual_seed(0)
    block = Block(32, 4, 48, 0, causal=True, num_kv_heads=kv_heads, head_dim=16).eval()
    init_weights(block)
    if kind == "adapted":
        add_adapters(block, LoRAConfig(rank=2))
        for adapter in adapters(block):
            torch.nn.init.normal_(adapter.b_proj.weight, std=0.05)  # type: ignore[union-attr,arg-type]
    rotary, (fast, slow) = RotaryPositions(16), (KVCache(1), KVCache(1))
    x_BTD, positions_BT = torch.randn(3, 9, 32), torch.arange(9) + torch.tensor([[0], [4], [11]])
    for first, end in ((0, 4), *((t, t + 1) for t in range(4, 9))):
        seen = torch.rand(3, 1, end - first, end) < 0.7
        seen[..., -1] = True
        turn, mask = rotary(positions_BT[:, first:end]), seen if kind == "masked" or end - first > 1 else None
        expected = block(x_BTD[:, first:end], turn, mask, slow)
        torch.testing.assert_close(run_block(block, x_BTD[:, first:end], turn, mask, fast), expected)
    assert fast.length == slow.length == 9


def test_rotary_positions_are_qwen3s() -> None:
    """x cos + (-second half, first half) sin, as the stock class computes it."""
    x_BTHd, positions_BT = torch.randn(2, 5, 3, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 9, 90, 91, 500]])
    angles = positions_BT[:, :, None, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    angles = torch.cat([angles, angles], dim=-1)
    turned = torch.cat([-x_BTHd[..., 4:], x_BTHd[..., :4]], dim=-1)
    expected = x_BTHd * angles.cos() + turned * angles.sin()
    torch.testing.assert_close(rotate(x_BTHd, *RotaryPositions(8)(positions_BT)), expected)


def _learned(block: Block, x_BTD: torch.Tensor) -> list[torch.Tensor]:
    """A block's output and gradients, with dropout and padding."""
    torch.manual_seed(1)
    block.train().zero_grad()
    rotary = RotaryPositions(16)(torch.arange(x_BTD.shape[1])[None])
    y_BTD = block(x_BTD, rotary, None, None, torch.arange(x_BTD.shape[1])[None] < torch.tensor([[12], [9]]))
    (y_BTD * torch.linspace(0, 1, y_BTD.numel()).view_as(y_BTD)).sum().backward()
    return [y_BTD.detach(), *(item.grad for item in block.parameters() if item.grad is not None)]


def _block() -> Block:
    torch.manual_seed(0)
    block = Block(64, 4, 128, 0, causal=False, conv_kernel=5, dropout=0.2)
    init_weights(block)
    return block


def test_activation_checkpointing_changes_the_memory_and_nothing_else() -> None:
    x_BTD, peaks, found = torch.randn(2, 12, 64), [], []
    for wanted in (False, True):
        block = _block()
        prepare_blocks(block, RunConfig(activation_checkpointing=wanted))
        with LiveBytes() as live:
            torch.manual_seed(1)
            kept = block.train()(x_BTD, RotaryPositions(16)(torch.arange(12)[None]))
            peaks.append(live.now)
            del kept
        found.append(_learned(block, x_BTD))
    assert peaks[1] < 0.2 * peaks[0]
    assert len(found[0]) == len(found[1]) > 10
    for plain, anew in zip(*found, strict=True):
        assert torch.equal(plain, anew)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_block_learns_the_same() -> None:
    x_BTD = torch.randn(2, 12, 64)
    compiled = _block()
    prepare_blocks(compiled, RunConfig(compile=True, activation_checkpointing=True))
    for block in (plain := _block(), compiled):
        block.dropout = 0.0  # compiled code draws other numbers
    for a, b in zip(_learned(plain, x_BTD), _learned(compiled, x_BTD), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x_BTD), compiled.eval()(x_BTD))
