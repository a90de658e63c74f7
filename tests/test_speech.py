"""Speech as a whole: chunks, states, sampling, and the stream that equals what is spoken at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from omni.audio import MelConfig, griffin_lim
from omni.config import UserError
from omni.generate_speech import Mind, speak
from omni.models.codec import CodecConfig
from omni.models.quantizer import QuantizerConfig
from omni.models.speaker import SpeakerConfig
from omni.models.speech import SpeechConfig, SpeechModel
from omni.models.talker import TalkerConfig
from omni.models.thinker import Thinker, ThinkerConfig
from omni.models.vocoder import VocoderConfig
from omni.sampling import GREEDY, Chances, Sampling, choose
from omni.speech_text import chunks, spoken_words
from omni.streaming import WindowedStream, stream_speech
from omni.thinker_states import StateReader, states_at_words, word_states
from omni.tokenizer import Tokenizer

TEXTS = (
    "Hello there.",
    "Wait - what? It's 21 o'clock, and 3.5 dogs (all brown) are gone!",
    "go on, and on, and on again until the end is near. " * 6 + "no mark at the end",
    "  one\ntwo\tthree\u00a0four <|end|> five  ",
)


@pytest.fixture(scope="module")
def model() -> SpeechModel:
    """A speech model from random weights that speaks through its trained vocoder."""
    torch.manual_seed(0)
    config = SpeechConfig(
        codec=CodecConfig(dim=16, num_layers=2, quantizer=QuantizerConfig(codebook_size=16, dim=8)),
        vocoder=VocoderConfig(dim=16, num_layers=2),
        speaker=SpeakerConfig(dim=16, embedding_dim=8),
        talker=TalkerConfig(dim=32, num_layers=2, num_heads=2, hidden_dim=48, window=8, state_dim=16),
        vocoder_kind="istft",
        thinker_layer=1,
        voices=("ann", "bob"),
    )
    model = SpeechModel(config).eval()
    with torch.no_grad():  # phases of some length, as after training: those of next to none turn with the last bit
        model.vocoder.out_proj.weight[model.vocoder.num_bins :] *= 50
    return model


@pytest.fixture(scope="module")
def mind() -> Mind:
    """A Thinker from random weights with a short context."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([text + "\n" for text in TEXTS] * 3, 320)
    config = ThinkerConfig(
        vocab_size=tokenizer.vocab_size, ctx_len=24, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=16
    )
    return Thinker(config).eval(), tokenizer


def voice() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator().manual_seed(1)), dim=-1)


def same_sound(wave_S: torch.Tensor, other_S: torch.Tensor) -> bool:
    """Alike to -60 dB: magnitudes are exponentials, which tell sums apart that were added in another order."""
    if len(wave_S) != len(other_S):
        return False
    return float((wave_S - other_S).abs().max()) <= 1e-3 * float(other_S.abs().max())


# ---- what is drawn ----


def test_sampling_is_a_function_of_its_seed_and_keeps_to_the_nucleus() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).repeat(500, 1)

    def draw(seed: int, **keys: float) -> list[int]:
        sampling = Sampling(1.0, seed=seed, **keys)
        return choose(logits, sampling, Chances(sampling, range(500)).next(500)).tolist()

    assert draw(3) == draw(3) != draw(4)
    assert set(draw(3, top_k=2)) == set(draw(3, top_p=0.9)) == {0, 1} and set(draw(3, top_p=0.5)) == {0}
    shares = [draw(3).count(code) / 500 for code in range(3)]
    assert shares == pytest.approx([0.665, 0.245, 0.09], abs=0.06)  # those of the softmax
    assert choose(logits, GREEDY, Chances(GREEDY, range(500)).next(500)).unique().tolist() == [0]


def test_a_row_draws_what_it_would_draw_alone() -> None:
    sampling = Sampling(1.0, seed=5)
    together, alone = Chances(sampling, [0, 7, 2]), Chances(sampling, [7])
    for _ in range(20):
        batch = together.next(3)
        assert batch is not None and torch.equal(batch[1:2], alone.next(1))


def test_the_end_of_the_chances_is_the_last_code_that_may_be_drawn() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    chance = torch.tensor([1.0])
    assert choose(logits, Sampling(1.0, top_k=2), chance).tolist() == [1]
    assert choose(logits, Sampling(1.0), chance).tolist() == [3]


# ---- the Thinker's states ----


def test_states_are_those_of_each_words_last_token() -> None:
    text = "Wait: 21 dogs."
    sizes = [2, 3, 1, 2, 1, 4, 1]  # tokens "Wa", "it:", " ", "21", " ", "dogs", "."
    states = states_at_words(torch.arange(7.0)[:, None], sizes, text, spoken_words(text))
    # units: pause, wait, pause, twenty, pause, one, pause, dogs, pause
    assert states[:, 0].tolist() == [0, 1, 1, 3, 3, 3, 3, 6, 6]


def test_states_of_a_growing_text_are_those_of_the_whole(mind: Mind) -> None:
    text = TEXTS[2]
    words = spoken_words(text)
    whole = word_states(*mind, [("beside it", spoken_words("beside it")), (text, words)], layer=1)[1]
    assert len(mind[1].encode(text)) > 3 * mind[0].config.ctx_len  # so that the context is full a few times
    reader = StateReader(*mind, layer=1)
    for number in range(0, len(words), 3):
        end = words[number].end
        known = [word for word in words if word.end <= end]
        found = reader.read(text[:end], known)
        torch.testing.assert_close(found, whole[: len(found)])


# ---- all at once ----


@torch.no_grad()
def test_speak_joins_chunks_and_knows_its_voices(model: SpeechModel) -> None:
    assert speak(model, [], torch.randn(0, 8)) == []  # no answer of a model that has just begun says anything
    spoken = speak(model, ["hello there.", "go on and on. " * 12], torch.randn(2, 8))
    assert len(spoken) == 2
    for item in spoken:
        assert len(item.wave) == len(item.frames_FM) * 160 and bool(torch.isfinite(item.wave).all())
    assert model.voice("bob").shape == (8,)
    with pytest.raises(UserError, match="ann, bob"):
        model.voice("carol")


@torch.no_grad()
def test_a_text_sounds_the_same_beside_others(model: SpeechModel, mind: Mind) -> None:
    speakers = voice().repeat(len(TEXTS), 1)
    for sampling in (GREEDY, Sampling(temperature=1.0)):
        together = speak(model, TEXTS, speakers, mind, sampling)
        for text, item in zip(TEXTS, together, strict=True):
            alone = speak(model, [text], speakers[:1], mind, sampling)[0]
            assert torch.equal(alone.codes_TK, item.codes_TK) and same_sound(alone.wave, item.wave)


def test_speed_changes_the_length_alone(model: SpeechModel) -> None:
    slow, fast = (speak(model, [TEXTS[2]], voice()[None], speed=speed)[0] for speed in (1.0, 2.0))
    assert len(fast.wave) == pytest.approx(len(slow.wave) / 2, rel=0.1)


# ---- piece by piece ----


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 50])
def test_windows_of_codec_and_vocoder_give_what_the_whole_gives(model: SpeechModel, size: int) -> None:
    torch.manual_seed(0)
    codec = model.codec
    cases: list[tuple[Callable[[torch.Tensor], torch.Tensor], int, int, int, tuple[int, ...]]] = [
        (codec.render, 8, codec.config.look_ahead, codec.config.reduction, (80,)),
        (model.waveforms, 80, model.vocoder_look_ahead, 160, ()),
    ]
    for function, width, context, ratio, shape in cases:
        x = torch.randn(60, width)
        stream = WindowedStream(function, context, ratio, shape)
        parts = [stream.push(x[at : at + size], at + size >= 60) for at in range(0, 60, size)]
        torch.testing.assert_close(torch.cat(parts), function(x[None])[0])
        assert len(parts[-1]) > 0 and (size > context or len(parts[0]) == 0)
        narrow = WindowedStream(function, context - 1, ratio, shape)  # the stated look-ahead is needed, and all of it
        parts = [narrow.push(x[at : at + size], at + size >= 60) for at in range(0, 60, size)]
        assert size == 50 or float((torch.cat(parts) - function(x[None])[0]).abs().max()) > 1e-6


@torch.no_grad()
def test_griffin_lim_streams(model: SpeechModel) -> None:
    """Its phases start at zero, so that a sample depends on a fixed neighbourhood alone."""
    torch.manual_seed(0)
    speaks = SpeechModel(dataclasses.replace(model.config, vocoder_kind="griffin_lim")).eval()
    speaks.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("vocoder")})
    x = torch.randn(400, 80)
    stream = WindowedStream(speaks.waveforms, speaks.vocoder_look_ahead, 160)
    parts = [stream.push(x[at : at + 12], at + 12 >= 400) for at in range(0, 400, 12)]
    torch.testing.assert_close(torch.cat(parts), speaks.waveforms(x[None])[0])
    sizes = [len(part) // 160 for part in parts if len(part)]
    assert len(parts[3]) == 0 < len(parts[4]) and sizes[1] >= sizes[0] and max(sizes[:-1]) >= speaks.vocoder_look_ahead
    # mel frames differ in their last bits, which can turn the phase of a bin that holds next to nothing: 40 dB below
    whole = speak(speaks, TEXTS[2:3], voice()[None])[0].wave
    streamed = torch.cat(list(stream_speech(speaks, TEXTS[2:3], voice())))
    assert len(streamed) == len(whole) and float((streamed - whole).norm()) < 0.01 * float(whole.norm())


def test_griffin_lim_of_a_single_frame() -> None:
    assert griffin_lim(torch.zeros(1, 1, 80), MelConfig()).shape[0] == 1


# one of a thousand draws stands at a boundary, where sums in another order decide: so only short texts are drawn
@pytest.mark.parametrize(
    ("text", "sampling"),
    [*((text, GREEDY) for text in TEXTS), *((TEXTS[number], Sampling(1.0, top_p=0.9)) for number in (0, 1, 3))],
)
@pytest.mark.parametrize("states", [True, False], ids=["states", "no_states"])
def test_streamed_speech_is_the_speech_of_the_whole_text(
    model: SpeechModel, mind: Mind, text: str, sampling: Sampling, states: bool
) -> None:
    known = mind if states else None
    whole = speak(model, [text], voice()[None], known, sampling)[0].wave
    for size in (1, 7, len(text)):
        pieces = (text[at : at + size] for at in range(0, len(text), size))
        streamed = torch.cat(list(stream_speech(model, pieces, voice(), known, sampling)))
        assert same_sound(streamed, whole)


def test_speech_begins_before_the_text_is_complete(model: SpeechModel) -> None:
    read = 0

    def pieces() -> Iterator[str]:
        nonlocal read
        for word in TEXTS[2].split(" "):
            read += 1
            yield word + " "

    sounds = stream_speech(model, pieces(), voice())
    assert len(next(sounds)) > 0
    # the first words, the characters that the last of them looks ahead, and one more word
    assert read <= 8 < len(TEXTS[2].split()) / 4


@torch.no_grad()
def test_the_look_ahead_over_characters_is_what_is_stated(model: SpeechModel) -> None:
    """A character further ahead changes nothing, the last one within does."""
    from omni.generate_codes import talker_text
    from omni.speech_text import units

    ahead = model.config.talker.look_ahead

    def encoded(text: str) -> torch.Tensor:
        rows = talker_text(model.talker, [units(spoken_words(text))], voice()[None], None)
        return model.talker.encode_text(rows)[0]

    base = "abcdefgh ijklmnop qrst"
    for at in (ahead, ahead + 1):
        changed = base[:at] + "z" + base[at + 1 :]
        far = float((encoded(base)[1] - encoded(changed)[1]).abs().max())  # position 1 is the "a"
        assert (far > 1e-6) == (at <= ahead), at


def test_nothing_to_stream_is_refused(model: SpeechModel) -> None:
    with pytest.raises(UserError, match="nothing to speak"):
        list(stream_speech(model, ["", " ... ", "😀"], voice()))


def test_chunks_are_decided_without_a_look_ahead() -> None:
    text = TEXTS[2]
    words = spoken_words(text)
    whole = chunks(text)

    for known in range(1, len(words)):
        part = chunks(text[: words[known - 1].end])
        assert [len(piece) for piece in part][:-1] == [len(piece) for piece in whole][: len(part) - 1]
