"""Guessing ahead: whatever the draft says, the answers are those that the Thinker gives without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omni.answer_text import AnswerText
from omni.decoding import Draft, Prompts, Rows
from omni.generate import Answer, AnswerSettings, Generation, draft_prompts, generate
from omni.models.kv_cache import Growing, KVCache
from omni.models.omni import OmniModel
from omni.models.thinker import Thinker
from omni.sampling import Sampling
from omni.tokenizer import AUDIO, IMAGE
from tests import toy_omni
from tests.toy_omni import Toy

DRAWN = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return toy_omni.with_prompts()


class Sayer(Thinker):
    """A draft that says what it is told to, whatever it reads: it shows which guesses are kept."""

    def __init__(self, like: Thinker, said: list[int]) -> None:
        super().__init__(like.config)
        self.said, self.calls = said, 0

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """The next of its tokens, certain."""
        logits = torch.zeros(*final.shape[:-1], self.config.vocab_size)
        logits[..., self.said[self.calls % len(self.said)]] = 9.0
        self.calls += 1
        return logits


def drafts(model: OmniModel) -> dict[str, Thinker]:
    """One that agrees wherever there is nothing to see, one that often does, and one that hardly ever does."""
    thinker = model.thinker
    torch.manual_seed(1)
    similar, other = Thinker(thinker.config).eval(), Thinker(replace(thinker.config, dim=16, num_layers=1)).eval()
    similar.load_state_dict(
        {name: weight + 0.04 * weight.std() * torch.randn_like(weight) for name, weight in thinker.state_dict().items()}
    )
    return {"same": thinker, "similar": similar, "other": other}


def written(toy: Toy, settings: AnswerSettings, draft: Draft | None, rows: slice = slice(None)) -> Generation:
    model, tokenizer, prompts, features = toy
    generation = Generation(model, tokenizer, prompts[rows], features, settings, draft)
    pieces = list(zip(*generation, strict=True))
    assert ["".join(row) for row in pieces] == [answer.text for answer in generation.answers]
    return generation


def same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)
        assert one.states.keys() == other.states.keys()
        for layer, states in one.states.items():
            torch.testing.assert_close(states, other.states[layer], atol=3e-5, rtol=1e-3)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["same", "similar", "other"])
def test_a_draft_changes_nothing_that_is_said(toy: Toy, name: str, sampling: Sampling) -> None:
    """In a batch with pictures and recordings, rows of unequal length of which each keeps another number of guesses."""
    model = toy[0]
    said = written(toy, AnswerSettings(30, sampling), None).answers[0].text
    settings = AnswerSettings(30, sampling, stop=(said[12:14], "never said"), states_of=(0, 2, 3))
    expected = written(toy, settings, None)
    assert expected.tally.guessed == 0 and {answer.finish for answer in expected.answers} >= {"stop"}
    for count in (1, 4):
        found = written(toy, settings, Draft(drafts(model)[name], count))
        same(found.answers, expected.answers)
        for row in (0, 4):
            same(written(toy, settings, Draft(drafts(model)[name], count), slice(row, row + 1)).answers,
                 expected.answers[row : row + 1])  # fmt: skip
        assert 0 <= found.tally.kept <= found.tally.guessed
        assert found.tally.guessed > 0 and found.tally.passes <= expected.tally.passes


def test_a_draft_that_agrees_saves_passes(toy: Toy) -> None:
    """Of a text prompt the Thinker itself is a draft that is always right: nine tokens by two passes."""
    for sampling in (Sampling(), DRAWN):
        found = written(toy, AnswerSettings(9, sampling), Draft(toy[0].thinker, 3), slice(0, 1))
        assert len(found.answers[0].tokens) == 9
        assert (found.tally.passes, found.tally.guessed, found.tally.kept) == (2, 6, 6)
    # of a picture it knows nothing, and is wrong sooner or later
    blind = written(toy, AnswerSettings(30), Draft(toy[0].thinker, 3), slice(1, 2)).tally
    assert 0 < blind.kept < blind.guessed


def test_similar_drafts_are_kept_in_part(toy: Toy) -> None:
    """So the comparisons above go through runs that are cut anywhere."""
    tallies = {name: written(toy, AnswerSettings(30), Draft(draft, 4)).tally for name, draft in drafts(toy[0]).items()}
    shares = {name: tally.kept / tally.guessed for name, tally in tallies.items()}
    assert 0.15 < shares["similar"] < 0.9 and shares["other"] < shares["similar"], shares


def test_ends_within_a_run(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token, a stop string and the most tokens, each at every place of the runs of a draft that is right."""
    model, tokenizer, prompts, _ = toy
    plain = written(toy, AnswerSettings(20), None, slice(0, 1)).answers[0].tokens
    for place in range(12):
        right = Draft(Sayer(model.thinker, plain[1:]), 5)
        assert written(toy, AnswerSettings(place), right, slice(0, 1)).answers[0].tokens == plain[:place]
        first = plain.index(plain[place])  # where that token ends the answer
        with monkeypatch.context() as patch:
            patch.setitem(tokenizer.special, "<|end|>", plain[place])
            right = Draft(Sayer(model.thinker, plain[1:]), 5)
            answer = written(toy, AnswerSettings(20, states_of=(3,)), right, slice(0, 1)).answers[0]
        assert answer.finish == "end" and answer.tokens == plain[:first]
        assert len(answer.states[3]) == len(prompts[0].tokens) + first
        text = AnswerText(tokenizer)
        before = "".join(text.push(token) for token in plain[:place])
        stop = (before + text.push(plain[place]))[-3:]
        if stop.strip():
            right = Draft(Sayer(model.thinker, plain[1:]), 5)
            same(written(toy, AnswerSettings(20, stop=(stop,)), right, slice(0, 1)).answers,
                 written(toy, AnswerSettings(20, stop=(stop,)), None, slice(0, 1)).answers)  # fmt: skip


def test_guesses_are_checked_one_by_one(toy: Toy) -> None:
    """Two right guesses and a wrong one: two are kept, and the Thinker says the third itself."""
    plain = written(toy, AnswerSettings(5), None, slice(0, 1)).answers[0].tokens
    wrong = next(token for token in range(40, 360) if token != plain[3])
    found = written(toy, AnswerSettings(5), Draft(Sayer(toy[0].thinker, [*plain[1:3], wrong]), 3), slice(0, 1))
    assert found.answers[0].tokens == plain
    assert (found.tally.passes, found.tally.guessed, found.tally.kept) == (2, 3, 2)


def test_the_context_is_filled_to_the_last_position(toy: Toy) -> None:
    """A row has the room that it has alone, beside longer ones; a draft reads nothing beyond what may be said."""
    model, tokenizer, prompts, features = toy
    long = replace(prompts[0], tokens=[*prompts[0].tokens * 20][:120], labels=[-100] * 120)
    for draft in (None, Draft(model.thinker, 4), Draft(drafts(model)["other"], 4)):
        answers = generate(model, tokenizer, [long, prompts[0]], features, AnswerSettings(500), draft=draft)
        assert [len(answer.tokens) for answer in answers] == [8, 128 - len(prompts[0].tokens)]
        assert {answer.finish for answer in answers} == {"length"}


def test_a_draft_reads_text_alone(toy: Toy) -> None:
    model, tokenizer, prompts, _ = toy
    read = draft_prompts(Draft(model.thinker), tokenizer, prompts)
    media = {tokenizer.special[IMAGE], tokenizer.special[AUDIO]}
    for row, prompt in enumerate(prompts):
        text = [token for token in prompt.tokens if token not in media]
        torch.testing.assert_close(
            read.embeddings_BTD[row][read.valid_BT[row]], model.thinker.embed(torch.tensor(text)).detach()
        )
        assert bool(read.valid_BT[row, -1])  # padded on the left
    assert len(read.valid_BT[0]) < max(len(prompt.tokens) for prompt in prompts)


# ---- reading and taking back ----


def test_what_is_taken_back_was_never_read(toy: Toy) -> None:
    """Rows that keep unequal numbers of positions go on like rows that read those alone; twice, after padding."""
    thinker, generator = toy[0].thinker, torch.Generator().manual_seed(2)
    tokens = torch.randint(40, 360, (3, 30), generator=generator)
    sizes, kept = [9, 4, 7], [[3, 0, 2], [1, 1, 4]]
    valid_BT = torch.arange(9)[None] >= 9 - torch.tensor(sizes)[:, None]
    prompt_BT = torch.zeros(3, 9, dtype=torch.long)
    for row, size in enumerate(sizes):
        prompt_BT[row, 9 - size :] = tokens[row, :size]
    rows = Rows(thinker, Prompts(thinker.embed(prompt_BT).detach(), valid_BT), states_of=(1, 3))
    said = [tokens[row, :size].tolist() for row, size in enumerate(sizes)]
    for step, counts in enumerate(kept):
        block_BT = tokens[:, 10 + 5 * step : 15 + 5 * step]
        rows.read(block_BT[:, :2]), rows.read(block_BT[:, 2:])
        rows.take_back(5 - torch.tensor(counts))
        for row, count in enumerate(counts):
            said[row] += block_BT[row, :count].tolist()
    logits_B2V = rows.read(tokens[:, 28:])
    for row, text in enumerate(said):
        with torch.no_grad():
            x = thinker.embed(torch.tensor([[*text, *tokens[row, 28:].tolist()]]))
            alone = thinker(x, states_of=(1, 3))
        torch.testing.assert_close(
            logits_B2V[row], thinker.logits(alone.final_BTD[0, -2:]).detach(), atol=3e-5, rtol=1e-4
        )
        for layer, states_TD in rows.states(row, len(text) + 2).items():
            torch.testing.assert_close(states_TD, alone.hidden_states[layer][0], atol=3e-5, rtol=1e-4)


def test_memory_grows_and_is_cut() -> None:
    pieces, cache, whole = (
        [torch.randn(2, 3, size, 4) for size in (5, 1, 70, 1, 200, 3)],
        KVCache(1),
        torch.empty(2, 3, 0, 4),
    )
    for piece in pieces:
        keys, values = cache.extend(0, piece, -piece)
        whole = torch.cat([whole, piece], dim=2)
        assert torch.equal(keys, whole) and torch.equal(values, -whole) and cache.length == whole.shape[2]
        cache.cut(whole.shape[2] - 1)
        whole = whole[:, :, :-1]
    grown = Growing(1)
    reserved = {grown.append(torch.zeros(1, 1, 2)).untyped_storage().data_ptr() for _ in range(1000)}
    assert len(reserved) < 8  # copied a few times, not a thousand
    with pytest.raises(AssertionError, match="no_grad"):
        grown.append(torch.zeros(1, 1, 2, requires_grad=True))
