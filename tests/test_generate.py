"""Decoding: batched is single, cached is uncached, pieces are the whole, and the states are those of one pass."""

from __future__ import annotations

import pytest
import torch

from omni.answer_text import AnswerText
from omni.data.chat_batch import collate_chats
from omni.data.dialogue import Encoded
from omni.generate import Answer, AnswerSettings, Generation, embed_batch, generate
from omni.sampling import Chances, Sampling, choose
from omni.tokenizer import Tokenizer
from tests import toy_omni
from tests.toy_omni import Toy

DRAWN = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=2)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return toy_omni.with_prompts()


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_a_batch_answers_like_single_prompts(toy: Toy, sampling: Sampling) -> None:
    """Unequal lengths, pictures and recordings; some rows end long before the others, by a stop string."""
    model, tokenizer, prompts, features = toy
    settings = AnswerSettings(30, sampling, stop=("are", "a "), states_of=(0, 2, 3))
    together = generate(model, tokenizer, prompts, features, settings, batch_size=len(prompts))
    assert len({len(prompt.tokens) for prompt in prompts}) > 3
    assert len({len(answer.tokens) for answer in together}) > 1 and len({answer.text for answer in together}) >= 4
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = generate(model, tokenizer, [prompt], features, settings)
        assert (alone.tokens, alone.text, alone.finish) == (found.tokens, found.text, found.finish)
        for layer, states in alone.states.items():
            assert states.shape == (len(prompt.tokens) + len(found.tokens), 32)
            torch.testing.assert_close(found.states[layer], states, atol=5e-5, rtol=1e-4)


def slowly(toy: Toy, prompt: Encoded, sampling: Sampling, count: int) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The same without a cache: everything is read anew for each token; and the states of one pass over all."""
    model, tokenizer, _, features = toy
    x = embed_batch(model, collate_chats([prompt], features.image, features.audio, tokenizer.pad_id, left=True))
    chances, tokens = Chances(sampling, [0]), list[int]()
    with torch.no_grad():
        for _ in range(count):
            logits = model.thinker.logits(model.thinker(x).final_BTD[:, -1])
            token = choose(logits, sampling, chances.next(1))
            tokens.append(int(token))
            x = torch.cat([x, model.thinker.embed(token[None])], dim=1)
        states = model.thinker(x, states_of=(0, 1, 2, 3)).hidden_states
    return tokens, {layer: states_BTD[0] for layer, states_BTD in states.items()}


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_with_a_cache_as_without(toy: Toy, sampling: Sampling) -> None:
    """Tokens, and the states of teacher forcing beside those of step-by-step decoding, in a padded batch."""
    model, tokenizer, prompts, features = toy
    found = generate(model, tokenizer, prompts, features, AnswerSettings(12, sampling, states_of=(0, 1, 2, 3)))
    for prompt, answer in zip(prompts, found, strict=True):
        tokens, states = slowly(toy, prompt, sampling, len(answer.tokens))
        assert answer.tokens == tokens and len(tokens) >= 4
        for layer in range(4):
            torch.testing.assert_close(answer.states[layer], states[layer], atol=5e-5, rtol=1e-4)


def test_pieces_are_the_whole_and_no_piece_splits_a_character(toy: Toy) -> None:
    model, tokenizer, prompts, features = toy
    generation = Generation(model, tokenizer, prompts, features, AnswerSettings(40))
    pieces = list(zip(*generation, strict=True))
    for row, answer in zip(pieces, generation.answers, strict=True):
        assert "".join(row) == answer.text and sum(map(bool, row)) > 8  # it streams
    whole = generate(model, tokenizer, prompts, features, AnswerSettings(40))
    assert [answer.text for answer in whole] == [answer.text for answer in generation.answers]


def test_sampling_follows_its_seed(toy: Toy) -> None:
    model, tokenizer, prompts, features = toy

    def texts(sampling: Sampling) -> list[str]:
        return [answer.text for answer in generate(model, tokenizer, prompts, features, AnswerSettings(16, sampling))]

    greedy = texts(Sampling())
    assert texts(DRAWN) == texts(DRAWN) != texts(Sampling(1.0, 40, 0.95, seed=6))
    assert texts(Sampling(temperature=1.0, top_k=1)) == greedy == texts(Sampling(temperature=1.0, top_p=1e-6))


def test_lengths_and_ends(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompts, features = toy

    def one(settings: AnswerSettings, prompt: Encoded = prompts[1]) -> Answer:
        return generate(model, tokenizer, [prompt], features, settings)[0]

    plain = one(AnswerSettings(20))
    assert plain.finish == "length" and len(plain.tokens) == 20
    mark = plain.text[9:11]
    cut = one(AnswerSettings(20, stop=(mark, "never said")))
    assert cut.finish == "stop" and cut.text == plain.text[: plain.text.index(mark)].strip() != ""
    assert len(cut.tokens) < 20
    assert one(AnswerSettings(0)).tokens == []
    # any mark of the template ends the answer, the end token among them
    fifth = plain.tokens[4]
    assert fifth not in plain.tokens[:4]
    for mark in ("<|end|>", "<|user|>"):
        with monkeypatch.context() as patch:
            patch.setitem(tokenizer.special, mark, fifth)
            answer = one(AnswerSettings(20, states_of=(3,)))
        assert answer.finish == "end" and answer.tokens == plain.tokens[:4]
        assert len(answer.states[3]) == len(prompts[1].tokens) + 4
    # a prompt as long as the context leaves no room
    full = Encoded([tokenizer.special["<|user|>"]] * 128, [-100] * 128)
    assert one(AnswerSettings(20), full).finish == "length" and one(AnswerSettings(20), full).text == ""


# ---- text from tokens ----


def said(tokenizer: Tokenizer, tokens: list[int], *stop: str) -> tuple[list[str], AnswerText]:
    text = AnswerText(tokenizer, stop)
    return [*(text.push(token) for token in tokens), text.end()], text


@pytest.mark.parametrize(
    "text", ["it is red .", "caf\u00e9 😀 \u4f60\u597d!", "a\n\nb  c", " \n padded \n ", "", "\u2581"]
)
def test_text_arrives_whole_and_trimmed(toy: Toy, text: str) -> None:
    tokenizer = toy[1]
    tokens = tokenizer.encode(f" {text}")
    pieces, found = said(tokenizer, tokens)
    assert "".join(pieces) == found.text == tokenizer.decode(tokens).strip()
    assert all("\ufffd" not in piece for piece in pieces) and not found.stopped


def test_what_is_no_utf8_is_replaced_once_it_is_certain(toy: Toy) -> None:
    tokenizer = toy[1]
    smile = tokenizer.encode("😀")
    assert len(smile) == 4  # bytes
    assert said(tokenizer, smile[:3])[0] == ["", "", "", "\ufffd"]
    assert "".join(said(tokenizer, [*smile[:2], *tokenizer.encode("red")])[0]) == "\ufffdred"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("red",), "it is"),
        (("d .", "red"), "it is"),
        (("is red . no",), "it is red ."),  # begins, and does not come
        ((" is", "t"), "i"),
        (("it",), ""),
        (("\n",), "it is red ."),
    ],
)
def test_stop_strings(toy: Toy, stop: tuple[str, ...], expected: str) -> None:
    tokenizer = toy[1]
    pieces, text = said(tokenizer, tokenizer.encode(" it is red ."), *stop)
    assert "".join(pieces) == text.text == expected
    assert text.stopped == any(mark in "it is red ." for mark in stop)
