"""Segments: positions that see each other alone, the same by groups of segments as by a mask."""

from __future__ import annotations

import pytest
import torch

from omni.models.layers import Block, RotaryPositions, init_weights
from omni.models.segments import Segments, unpadded

LENGTHS = [40, 3, 21, 57, 1, 6]  # two rows of 64


def learned(block: Block, mask: torch.Tensor | Segments) -> list[torch.Tensor]:
    """What comes out of two rows, and all gradients."""
    block.zero_grad()
    x_BTD = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(2))
    y_BTD = block(x_BTD, RotaryPositions(16)(torch.arange(64)[None]), mask)
    (y_BTD * weights).sum().backward()
    grads = [parameter.grad for parameter in block.parameters()]
    return [y_BTD.detach(), *(grad for grad in (x_BTD.grad, *grads) if grad is not None)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_are_what_a_mask_says(causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = Block(32, 2, 48, 0, causal=causal, num_kv_heads=1, head_dim=16)
    init_weights(block)
    segments = Segments(LENGTHS)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        apart, masked = learned(block, segments), learned(block, segments.mask(2, 64, causal))
    assert len(apart) == len(masked) == 2 + len(list(block.parameters()))
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(apart, masked, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near * float(other.abs().max()))


def test_a_segment_sees_nothing_of_another() -> None:
    torch.manual_seed(0)
    block = Block(32, 2, 48, 0, causal=False)
    init_weights(block)
    segments, x_BTD = Segments(LENGTHS), torch.randn(2, 64, 32)
    changed = x_BTD.clone()
    third = (segments.numbers_N == 2).view(2, 64)
    changed[third] += 1
    differs = (block(x_BTD, mask=segments) - block(changed, mask=segments)).abs().amax(-1) > 1e-6
    assert torch.equal(differs, third)


def test_groups_hold_every_position_once_and_little_padding() -> None:
    segments = Segments([1, 0, 70, 64, 12, 33])
    assert [(group.num_segments, group.longest) for group in segments.groups] == [(2, 70), (2, 33), (1, 1)]
    assert torch.equal(segments.places_M[segments.back_N], torch.arange(180))
    assert len(segments.places_M) == 140 + 66 + 1 and len(segments.padding_P) == 6 + 21
    assert segments.numbers_N.tolist() == [0] + [1] * 70 + [2] * 64 + [3] * 12 + [4] * 33


def test_a_compiled_block_reads_segments_as_a_mask() -> None:
    torch.manual_seed(0)
    block = Block(32, 2, 48, 0, causal=True, num_kv_heads=1, head_dim=16)
    init_weights(block)
    seen: list[object] = []

    def compiled(x_BTD: torch.Tensor, rotary: object, mask: object, *rest: object) -> torch.Tensor:
        seen.append(mask)
        return block._compute(x_BTD, rotary, mask, *rest)  # type: ignore[arg-type]

    plain = learned(block, Segments(LENGTHS))
    block._compiled = compiled
    for one, other in zip(learned(block, Segments(LENGTHS)), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert isinstance(seen[0], torch.Tensor) and seen[0].shape == (2, 1, 64, 64)


def test_rows_lose_their_padding_and_get_it_back() -> None:
    valid_BT = torch.arange(7)[None] < torch.tensor([3, 7, 1])[:, None]
    rows_BT = torch.arange(21).view(3, 7) * valid_BT
    words = unpadded(valid_BT, multiple=4)
    assert words.of(rows_BT).tolist() == [[0, 1, 2, 7, 8, 9, 10, 11, 12, 13, 14, 0]]
    assert torch.equal(words.padded(words.of(rows_BT)[0]), rows_BT)
    assert len(unpadded(torch.ones(2, 3, dtype=torch.bool), multiple=4).places_N) == 6  # there is nothing to add
