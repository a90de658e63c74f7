"""What needs a GPU: a killed run on CUDA, made deterministic, ends as one that nothing disturbed; what that costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from omni.hearing import as_written, log_likelihoods, words_heard
from omni.models.ctc import ctc_sum
from tests import toy_omni
from tests.small_shapes import AUDIO_SHAPE
from tests.test_training_loop import CONFIG, assert_same, start, train, wait_for_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.mark.parametrize("amp", ["true", "false"])
def test_killed_and_continued_is_undisturbed(amp: str, config: Path, tmp_path: Path) -> None:
    words = ("--device", "cuda", "--deterministic", "true", "--use_amp", amp)
    assert train(config, tmp_path / "whole", *words) == 0
    child = start(config, tmp_path / "run", *words, "--sleep", "0.05")
    wait_for_steps(child, tmp_path / "run", 7)
    child.kill()
    child.wait(60)
    assert train(config, tmp_path / "run", *words) == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_deterministic_ctc_has_the_same_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, 8, generator=generator).cuda().requires_grad_()
    targets = torch.randint(1, 8, (3, 5), generator=generator).cuda()
    steps, sizes = torch.tensor([20, 15, 12]).cuda(), torch.tensor([5, 4, 2]).cuda()
    gradients = []
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            loss = ctc_sum(logits.log_softmax(-1), targets, steps, sizes)
            gradients.append(torch.autograd.grad(loss, logits)[0])
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*gradients)


def test_words_are_heard_and_lines_read_on_the_device() -> None:
    model, tokenizer = toy_omni.build()
    texts = ["who has the ball ?", "two and two", "WHAT is it"]
    states = [torch.randn(size, AUDIO_SHAPE.dim, generator=torch.Generator().manual_seed(size)) for size in (4, 9)]
    on_cpu = log_likelihoods(model.thinker, tokenizer, texts)
    model.cuda()
    assert log_likelihoods(model.thinker, tokenizer, texts) == pytest.approx(on_cpu, rel=1e-3)
    assert len(words_heard(model.audio_encoder, model.thinker, tokenizer, states)) == 2
    assert len(as_written(model.thinker, tokenizer, texts)) == 3
