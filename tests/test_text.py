"""Packed text: which tokens are answers, and which documents may see each other."""

from __future__ import annotations

import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch

from omni.config import DataConfig, UserError
from omni.data.text import (
    PackedDocuments,
    TextBatch,
    arranged,
    fit,
    fit_in_order,
    learn_tokenizer,
    packed,
    pieces,
    read_text,
    tokenize,
)
from omni.models.thinker import Thinker, ThinkerConfig
from omni.rehearsal import forget_peak, peak_resident
from omni.tokenizer import IGNORE, MAX_LINE_BYTES, Tokenizer, spoken_text

CHAT = "<|user|> one?<|end|><|assistant|> two<|end|><|user|> three?<|end|><|assistant|> four<|end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["one two three four five six seven eight nine ten " * 3] * 20, 320)


def batch(text: str, tokenizer: Tokenizer, separate: bool) -> TextBatch:
    tokens = np.array([token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line)])
    windows = packed(tokens, len(tokens) - 2, tokenizer, separate, order="text")
    return windows.collate([windows.sample(0, None)])


def test_answers_are_what_the_assistant_says_with_its_end(tokenizer: Tokenizer) -> None:
    found = batch(f"five six\n\n{CHAT}\n\nseven", tokenizer, separate=False)
    said = tokenizer.decode(found.labels_BT[found.answers_BT].tolist())
    assert said == " two<|end|> four<|end|>"
    assert found.counts["answers"] == int(found.answers_BT.sum())
    assert found.segments is None


def test_documents_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    found = batch("one two three\nfour\n\nfive six\n\nseven eight nine ten", tokenizer, separate=True)
    pieces = [tokenizer.decode([token]) for token in found.tokens_BT[0].tolist()]
    assert found.segments is not None
    documents_T = found.segments.numbers_N
    assert int(documents_T[0]) == 0 and int(documents_T.max()) == 2
    assert documents_T[pieces.index("six") if "six" in pieces else pieces.index(" six")] == 1
    torch.manual_seed(0)
    thinker = Thinker(ThinkerConfig(64, tokenizer.vocab_size, dim=32, num_heads=2, num_kv_heads=1, hidden_dim=64))
    for block in thinker.layers:  # layers say nothing at first
        torch.nn.init.normal_(block.self_attn.o_proj.weight)
    with torch.no_grad():
        together = thinker(thinker.embed(found.tokens_BT), mask=found.segments).final_BTD
        rows = documents_T == 1
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
    assert found.segments is not None
    for number in range(int(found.segments.numbers_N.max()) + 1):
        part = found.segments.numbers_N.view_as(found.tokens_BT) == number
        if bool((found.labels_BT[part] != IGNORE).any()):
            inputs, labels = found.tokens_BT[part], found.labels_BT[part]
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


def test_windows_of_lessons_follow_one_another_and_are_nearly_as_full() -> None:
    sizes = np.random.default_rng(0).integers(60, 200, 3000).tolist()
    best, lessons, text = (arranged(sizes, 256, order) for order in ("best", "lessons", "text"))
    for groups in (best, lessons, text):
        assert sorted(index for group in groups for index in group) == list(range(3000))
        assert all(sum(sizes[index] for index in group) <= 256 for group in groups)
    assert len(best) <= len(lessons) < 1.05 * len(best) and len(text) > 1.1 * len(best)
    runs = [index // 256 for group in lessons for index in group]
    assert runs == sorted(runs)
    assert [index for group in text for index in group] == list(range(3000))


# ---- long lines, and what is spoken of a text ----


def words(number: int, seed: int = 0) -> str:
    """Words of some letters, now and then with several spaces or a longer line's end before them."""
    rng = np.random.default_rng(seed)
    known = ["".join(rng.choice(list("abcdefghé☃"), rng.integers(1, 9))) for _ in range(500)]
    gaps = [" ", " ", " ", "  ", " \t", "    "]
    return "".join(f"{gaps[g]}{known[w]}" for w, g in rng.integers(0, (500, 6), (number, 2)))


def test_pieces_make_the_tokens_of_the_line() -> None:
    line = words(40_000)
    tokenizer = Tokenizer.train([words(2000, seed) for seed in range(5)], 500)
    parts = list(pieces(line))
    assert len(parts) > 3 and "".join(parts) == line
    assert all(len(part.encode()) <= MAX_LINE_BYTES for part in parts)
    assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode(line)
    assert list(pieces("an ordinary line\n")) == ["an ordinary line\n"] and list(pieces("")) == [""]
    for odd in ("x" * 60_000, " " * 60_000, "x" * 30_000 + " " + "y" * 30_000, "☃" * 26_000 + " "):
        assert "".join(pieces(odd)) == odd and max(len(part.encode()) for part in pieces(odd)) <= MAX_LINE_BYTES


def test_ordinary_text_has_the_tokenizer_and_the_tokens_that_it_had(tmp_path: Path) -> None:
    text = "\n".join(words(300, seed) for seed in range(30)) + "\u2028 one\x0bmore\n\nend"
    tokenizer = learn_tokenizer(text, 400, tmp_path)
    assert tokenizer.model == Tokenizer.train(text.splitlines(), 400).model
    expected = [token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line)]
    found = tokenize(text, tokenizer, tmp_path)
    assert found.dtype == np.uint16 and found.tolist() == expected and tokenizer.decode(expected) == text
    # lines that only together are long are as learnable as one
    assert learn_tokenizer(text.replace("\n", " "), 400, tmp_path).vocab_size == 400


def one_line(path: Path, megabytes: int) -> int:
    """Write a text of one line; its length in characters."""
    piece = words(20_000).replace("\t", " ")
    piece = piece[: len(piece) // 2 * 2]
    times = megabytes * 10**6 // len(piece.encode()) + 1
    path.write_text(piece * times)
    return len(piece) * times


def check_one_line(folder: Path, megabytes: int) -> None:
    path = folder / "text.txt"
    size = one_line(path, megabytes)
    with pytest.raises(UserError, match=rf"text\.txt:1: found {size} characters, expected at most 1000000 "):
        read_text(path)
    text = read_text(path, DataConfig(max_text_chars=size))
    tokenizer = learn_tokenizer(text, 400, folder)
    tokens = tokenize(text, tokenizer, folder)
    assert tokenizer.decode(tokens[:1000].tolist()) == text[: len(tokenizer.decode(tokens[:1000].tolist()))]
    assert len(tokens) < size  # it learned words, not bytes alone
    assert sum(tokenizer.num_bytes(token) * int(n) for token, n in enumerate(np.bincount(tokens))) == len(text.encode())


def test_two_megabytes_on_one_line(tmp_path: Path) -> None:
    check_one_line(tmp_path, 2)


@pytest.mark.slow
def test_fifty_megabytes_on_one_line(tmp_path: Path) -> None:
    forget_peak()
    before = peak_resident()
    check_one_line(tmp_path, 50)
    assert peak_resident() - before < 1.5e9


def test_spoken_text_drops_the_punctuation_of_any_script() -> None:
    assert spoken_text("“Well – it’s «done»… ¿no?” — 5 € ☃ °C") == "well it's done no 5 c"
    assert spoken_text("…?! —") == ""
    assert spoken_text("naïve жук") == "naïve жук"


def test_spoken_text_of_ascii_is_what_it_was() -> None:
    rng = np.random.default_rng(0)
    old = str.maketrans({c: " " for c in string.punctuation if c != "'"})
    for _ in range(2000):
        text = "".join(rng.choice(list(string.printable), 30))
        expected = text.lower().translate(old)
        expected = " ".join(re.sub(r"(?<![a-z])'|'(?![a-z])", " ", expected).split())
        assert spoken_text(text) == expected
