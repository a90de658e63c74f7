"""The optimizers."""

from __future__ import annotations

import pytest
import torch

from omni import optim
from omni.config import PhaseConfig, UserError
from omni.optim import (
    Muon,
    build_optimizer,
    get_lr_scheduler,
    orthogonalized,
    restore_optimizer,
    trainable_parameters,
)


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


def test_orthogonalized_matrices_have_singular_values_of_about_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(4, 24, 9) * 7
    made = {}
    for hardware in (True, False):
        monkeypatch.setattr(optim, "multiplies_bf16", lambda device, found=hardware: found)
        made[hardware] = orthogonalized(matrices, (3.4445, -4.7750, 2.0315), 5)
        values = torch.linalg.svdvals(made[hardware].float())
        assert float(values.min()) > 0.4 and float(values.max()) < 1.4
    # without bf16 in hardware it would be emulated, 60 times as slow as fp32
    assert made[True].dtype == torch.bfloat16 and made[False].dtype == torch.float32
    torch.testing.assert_close(made[True].float(), made[False], atol=0.03, rtol=0)


def test_learning_rates_are_ratios_of_the_phases() -> None:
    modules = torch.nn.ModuleList(torch.nn.ModuleDict({"layers": torch.nn.Linear(3, 4)}) for _ in range(3))
    named = trainable_parameters(modules)
    config = PhaseConfig(max_steps=10, batch_size=1, lr=0.1, muon_lr=0.02, optimizer="muon", warmup_steps=0)
    ratios = [1.0, 0.5, 1.0]
    before = [parameter.detach().clone() for _, parameter in named]
    optimizer = build_optimizer(named, config, ratios)
    get_lr_scheduler(optimizer, 0, 10)(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for (name, parameter), ratio in zip(named, [1.0, 1.0, 0.5, 0.5, 1.0, 1.0], strict=True):
        assert rates[id(parameter)] == (0.02 if name.endswith("weight") else 0.1) * ratio
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = [
        float((now.detach() - old).abs().mean()) for (_, now), old in zip(named, before, strict=True) if now.ndim == 1
    ]
    assert moved == pytest.approx([0.1, 0.05, 0.1], rel=1e-3)
    # the same ratio for all is no ratio: the groups of a checkpoint from before there were any
    plain, ones = build_optimizer(named, config), build_optimizer(named, config, [1.0] * 3)
    assert [len(group["params"]) for group in plain.param_groups] == [
        len(group["params"]) for group in ones.param_groups
    ]
    with pytest.raises(UserError, match=r"sft\.optimizer: found a checkpoint that trained other parameters"):
        restore_optimizer(optimizer, plain.state_dict(), "sft.optimizer")
