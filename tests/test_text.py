"""Packed text: which tokens are answers, and which documents may see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omni.data.text import PackedText, TextBatch
from omni.models.thinker import Thinker, ThinkerConfig
from omni.tokenizer import Tokenizer

CHAT = "<|user|> one?<|end|><|assistant|> two<|end|><|user|> three?<|end|><|assistant|> four<|end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["one two three four five six seven eight nine ten " * 3] * 20, 320)


def batch(text: str, tokenizer: Tokenizer, separate: bool) -> TextBatch:
    tokens = np.array([token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line)])
    packed = PackedText(tokens, len(tokens) - 2, tokenizer, separate)
    return packed.collate([packed.sample(0, None)])


def test_answers_are_what_the_assistant_says_with_its_end(tokenizer: Tokenizer) -> None:
    found = batch(f"five six\n\n{CHAT}\n\nseven", tokenizer, separate=False)
    said = tokenizer.decode(found.labels_BT[found.answers_BT].tolist())
    assert said == " two<|end|> four<|end|>"
    assert found.counts["answers"] == int(found.answers_BT.sum())
    assert found.mask() is None


def test_documents_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    found = batch("one two three\nfour\n\nfive six\n\nseven eight nine ten", tokenizer, separate=True)
    pieces = [tokenizer.decode([token]) for token in found.tokens_BT[0].tolist()]
    assert found.documents_BT[0].tolist()[0] == 0 and int(found.documents_BT.max()) == 2
    assert found.documents_BT[0][pieces.index("six") if "six" in pieces else pieces.index(" six")] == 1
    mask = found.mask()
    assert mask is not None
    torch.manual_seed(0)
    thinker = Thinker(ThinkerConfig(64, tokenizer.vocab_size, dim=32, num_heads=2, num_kv_heads=1, hidden_dim=64))
    for block in thinker.layers:  # layers say nothing at first
        torch.nn.init.normal_(block.self_attn.o_proj.weight)
    with torch.no_grad():
        together = thinker(thinker.embed(found.tokens_BT), mask=mask).final_BTD
        rows = found.documents_BT[0] == 1
        alone = thinker(thinker.embed(found.tokens_BT[:, rows])).final_BTD
    torch.testing.assert_close(together[:, rows], alone, atol=1e-5, rtol=1e-4)
