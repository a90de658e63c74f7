"""Words of recordings: what CTC takes for possible, weighed by what the Thinker has read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omni.hearing import WEIGHT, _proposals, as_written, log_likelihoods, words_heard
from omni.models.audio_encoder import AudioEncoder, transcripts
from omni.models.ctc import prefix_search
from omni.models.thinker import Thinker, ThinkerConfig
from omni.tokenizer import END, USER, Characters, Tokenizer, turn_text
from tests.small_shapes import AUDIO_SHAPE

TEXTS = ["the cat is red", "a car", "two cats see the red car .", "", "the cat is red"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat is red . a car sees two cats"] * 30, 300)


def thinker_of(tokenizer: Tokenizer) -> Thinker:
    torch.manual_seed(0)
    return Thinker(
        ThinkerConfig(
            ctx_len=32, vocab_size=tokenizer.vocab_size, dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
            hidden_dim=16,
        )
    ).eval()  # fmt: skip


def row_of(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(f"{USER}{turn_text(text)}{END}")])


def test_a_likelihood_is_that_of_the_whole_turn_in_any_company(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinker, expected = thinker_of(tokenizer), []
    for text in TEXTS:
        row_1T = row_of(tokenizer, text)
        with torch.no_grad():
            logits = thinker.logits(thinker(thinker.embed(row_1T[:, :-1])).final_BTD)[0]
        expected.append(float(logits.log_softmax(-1).gather(1, row_1T[0, 1:, None]).sum()))
    assert log_likelihoods(thinker, tokenizer, TEXTS) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("omni.hearing._TOKENS", 8)
    assert log_likelihoods(thinker, tokenizer, TEXTS) == pytest.approx(expected, rel=1e-5)
    assert log_likelihoods(thinker, tokenizer, []) == []


def learn(thinker: Thinker, tokenizer: Tokenizer, text: str) -> None:
    optimizer, row_1T = torch.optim.Adam(thinker.parameters(), 0.02), row_of(tokenizer, text)
    for _ in range(30):
        loss = F.cross_entropy(thinker.logits(thinker(thinker.embed(row_1T[:, :-1])).final_BTD)[0], row_1T[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def unsure_encoder() -> AudioEncoder:
    """An encoder whose state i, of one dimension alone, says: nothing, c, a, or rather r than t."""
    encoder, characters = AudioEncoder(AUDIO_SHAPE).eval(), Characters()
    with torch.no_grad():
        encoder.head.weight.zero_()
        encoder.head.bias.zero_()
        says = encoder.head.weight.view(AUDIO_SHAPE.steps_per_state, Characters.size, -1)
        says[1:, Characters.blank] = 30.0
        says[0, Characters.blank, 0] = 30.0
        for state, letter, logit in ((1, "c", 30.0), (2, "a", 30.0), (3, "r", 30.0), (3, "t", 29.5)):
            says[0, characters.encode(letter)[0], state] = logit
    return encoder


def test_the_thinker_decides_where_sounds_do_not(tokenizer: Tokenizer) -> None:
    encoder, thinker = unsure_encoder(), thinker_of(tokenizer)
    states = [torch.eye(AUDIO_SHAPE.dim)[[1, 0, 2, 0, 3]], torch.eye(AUDIO_SHAPE.dim)[[1, 2, 0]]]
    with torch.no_grad():
        by_sound = encoder.read(states[0][None])
    assert Characters().decode(prefix_search(by_sound[0], beam=8)[0][0]) == "car"
    learn(thinker, tokenizer, "cat")
    cat, car = log_likelihoods(thinker, tokenizer, ["cat", "car"])
    assert WEIGHT * (cat - car) > 0.5
    assert words_heard(encoder, thinker, tokenizer, states) == ["cat", "ca"]
    assert [words_heard(encoder, thinker, tokenizer, [one])[0] for one in states] == ["cat", "ca"]


@pytest.mark.parametrize("line", ["is the cat red?", "Is the cat red?", "IS THE CAT RED?", "Is the cat red."])
def test_a_line_is_read_as_the_thinker_would_write_it(tokenizer: Tokenizer, line: str) -> None:
    """Whatever way to write it has learned; a mark that was typed stays."""
    thinker = thinker_of(tokenizer)
    learn(thinker, tokenizer, line)
    typed = ["is the cat red", " Is the cat red ", line]
    if line == line.upper():
        typed = [line, "IS THE CAT RED"]  # nothing is shouted that was not
    assert set(as_written(thinker, tokenizer, typed)) == {line}
    assert as_written(thinker, tokenizer, ["is the cat red!"])[0][-1] == "!"  # what was typed
    assert as_written(thinker, tokenizer, ["", " "]) == ["", ""]
    others = ["is the cat\nred", "is the cat red " * 20, "\u4f60\u597d", "Stra\u00dfe"]
    assert [text.lower().rstrip(".?") for text in as_written(thinker, tokenizer, others)] == [
        text.lower() for text in others
    ]
    assert as_written(thinker, tokenizer, others[:2]) == others[:2]  # no line


def test_a_recording_of_nothing_has_no_words(tokenizer: Tokenizer) -> None:
    silence = torch.eye(AUDIO_SHAPE.dim)[[0, 0, 0]]
    assert words_heard(unsure_encoder(), thinker_of(tokenizer), tokenizer, [silence]) == [""]
    assert words_heard(unsure_encoder(), thinker_of(tokenizer), tokenizer, []) == []


def test_who_is_sure_of_nothing_proposes_one_text() -> None:
    encoder = AudioEncoder(AUDIO_SHAPE).eval()
    with torch.no_grad():
        encoder.head.weight.normal_(std=0.1)  # all symbols are about as likely
        assert len(_proposals(encoder, torch.randn(40, AUDIO_SHAPE.dim))) == 1
        assert len(_proposals(unsure_encoder(), torch.eye(AUDIO_SHAPE.dim)[[1, 0, 2, 0, 3]])) == 2


def test_states_are_read_as_the_encoder_reads_them() -> None:
    torch.manual_seed(0)
    encoder = AudioEncoder(AUDIO_SHAPE).eval()
    with torch.no_grad():
        output = encoder(torch.randn(2, 40, AUDIO_SHAPE.mel.num_mels), torch.tensor([40, 24]))
        assert torch.equal(encoder.read(output.states_BTD), output.log_probs_BSV)
    assert len(transcripts(output)) == 2
