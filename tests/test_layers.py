"""The shared layers: what is fast equals what is plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omni.models.layers import RMSNorm, TimeConv, attend, dropout
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
