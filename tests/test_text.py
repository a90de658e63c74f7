"""Packed text: which tokens are answers, and which documents may see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omni.data.text import PackedDocuments, TextBatch, fit, fit_in_order, packed
from omni.models.thinker import Thinker, ThinkerConfig
from omni.tokenizer import IGNORE, Tokenizer

CHAT = "<|user|> one?<|end|><|assistant|> two<|end|><|user|> three?<|end|><|assistant|> four<|end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["one two three four five six seven eight nine ten " * 3] * 20, 320)


def batch(text: str, tokenizer: Tokenizer, separate: bool) -> TextBatch:
    tokens = np.array([token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line)])
    windows = packed(tokens, len(tokens) - 2, tokenizer, separate, in_order=True)
    return windows.collate([windows.sample(0, None)])


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


def test_packing_cuts_no_document_and_loses_no_token(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    texts = [
        " ".join([["one", "two", "three", "four", "five", "six"][i] for i in rng.integers(0, 6, n)])
        for n in (3, 9, 17) * 9
    ]
    text = "\n\n".join([*texts, CHAT])
    tokens = np.array([token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line)])
    windows = PackedDocuments(tokens, 40, tokenizer)
    found = windows.collate([windows.sample(index, np.random.default_rng(index)) for index in range(len(windows))])
    said = []
    for row in range(len(windows)):
        for number in range(int(found.documents_BT[row].max()) + 1):
            part = found.documents_BT[row] == number
            if bool((found.labels_BT[row, part] != IGNORE).any()):
                inputs, labels = found.tokens_BT[row, part], found.labels_BT[row, part]
                assert torch.equal(inputs[1:], labels[:-1])
                said.append(tokenizer.decode(inputs.tolist()).strip())
    assert sorted(said) == sorted([*texts, CHAT])
    assert found.counts["tokens"] == int((found.labels_BT != IGNORE).sum()) == len(tokens) - len(windows)
    assert tokenizer.decode(found.labels_BT[found.answers_BT].tolist()) == " two<|end|> four<|end|>"
    assert len(windows) * 40 < 1.15 * len(tokens)


def test_a_document_longer_than_a_window_comes_in_pieces(tokenizer: Tokenizer) -> None:
    tokens = np.array(tokenizer.encode("one two three four five six seven eight nine ten " * 9))
    windows = PackedDocuments(tokens, 16, tokenizer)
    pieces = [piece for index in range(len(windows)) for piece in windows.sample(index, None)]
    assert max(map(len, pieces)) == 16 and sum(map(len, pieces)) in (len(tokens), len(tokens) - 1)


def test_fit_fills_groups() -> None:
    sizes = [7, 3, 5, 5, 2, 8, 10, 1, 4, 5]
    groups = fit(sizes, 10)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in group) <= 10 for group in groups)
    assert len(groups) == 5  # their sum is 50
    assert fit_in_order(sizes, 10) == [[0, 1], [2, 3], [4, 5], [6], [7, 8, 9]]
