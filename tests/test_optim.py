"""The optimizers."""

from __future__ import annotations

import torch

from omni.optim import Muon, orthogonalized


def test_muon_in_batches_does_what_torchs_does() -> None:
    torch.manual_seed(0)
    shapes = [(12, 20), (20, 12), (12, 20), (16, 16), (12, 20)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    batched = Muon(ours, lr=0.1, weight_decay=0.2)
    plain = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        batched.step()
        plain.step()
    for one, other in zip(ours, theirs, strict=True):  # both round to bf16, in another order
        torch.testing.assert_close(one, other, atol=0.01, rtol=0)
        assert bool(((one - 1).abs() > 0.1).any())
        torch.testing.assert_close(batched.state[one]["momentum_buffer"], plain.state[other]["momentum_buffer"])


def test_orthogonalized_matrices_have_singular_values_of_about_one() -> None:
    torch.manual_seed(0)
    made = orthogonalized(torch.randn(4, 24, 9) * 7, (3.4445, -4.7750, 2.0315), 5).float()
    values = torch.linalg.svdvals(made)
    assert float(values.min()) > 0.4 and float(values.max()) < 1.4
