"""The Talker: timing, conditioning, decoding, and a whole stage D in miniature."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from omni import alignment
from omni.audio import MelConfig
from omni.checkpoint import load_checkpoint, save_checkpoint
from omni.config import UserError, from_dict, to_dict
from omni.data.speech import read_speech_manifest
from omni.data.voices import Aligned, Pairs, SentenceBatch, Sentences, Voices, WaveCrops
from omni.generate_codes import generate_codes
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from omni.models.codec import CodecConfig
from omni.models.quantizer import QuantizerConfig, neighbour_shares
from omni.models.speaker import SpeakerConfig
from omni.models.speech import SpeechConfig, SpeechModel, speech_from_checkpoint
from omni.models.talker import Talker, TalkerConfig, talker_losses
from omni.models.vocoder import VocoderConfig
from omni.sampling import GREEDY, Sampling
from omni.speech_text import chunks, spoken_words, units
from omni.timing import plan_batch, plan_frames, round_durations, unit_durations, unit_symbols, word_spans
from omni.tokenizer import Characters
from tests.forked import Child, start_module

ROOT = Path(__file__).resolve().parents[1]
CODEBOOKS = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(2))
TALKER = TalkerConfig(dim=32, num_layers=2, num_heads=2, hidden_dim=48, window=8, dropout=0.0, state_dim=6)


def small_talker() -> Talker:
    torch.manual_seed(0)
    return Talker(TALKER, num_codebooks=3, codebook_size=16, speaker_dim=8).eval()


def sentence(text: str, frames_per_letter: int = 2) -> tuple[list[str], list[int]]:
    parts = units(spoken_words(text))
    return parts, [len(part) * frames_per_letter if number % 2 else number % 3 for number, part in enumerate(parts)]


def batch_of(texts: list[str], states: bool = True) -> SentenceBatch:
    torch.manual_seed(1)
    aligned = []
    for text in texts:
        parts, durations = sentence(text)
        codes = torch.randint(16, (sum(durations), 3))
        aligned.append(Aligned(0, parts, durations, codes, torch.randn(len(parts), 6) if states else None))
    embeddings = torch.nn.functional.normalize(torch.randn(len(texts), 8), dim=-1)
    collate = Sentences.collate  # needs no recordings
    return collate(object.__new__(Sentences), list(zip(aligned, embeddings, strict=True)))


# ---- text ----


def test_digits_symbols_and_accents_are_spoken() -> None:
    said = " ".join(
        word.letters for word in spoken_words("At 3 o'clock, 12% of 1,200 cafés & bars — 2nd “rate” 😀 don't!")
    )
    assert said == "at three o'clock twelve percent of one thousand two hundred cafes and bars second rate don't"


def test_units_alternate_and_keep_punctuation_as_pauses() -> None:
    assert units(spoken_words("Stop, he said.")) == [" ", "stop", ",", "he", " ", "said", "."]
    text = "Wait: 21 dogs."
    assert [text[: word.end].split()[-1] for word in spoken_words(text)] == ["Wait:", "21", "21", "dogs."]


@pytest.mark.parametrize("text", ["", "   ", "😀", "你好", "...", "x" * 30_000])
def test_what_cannot_be_spoken_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(UserError, match=r"found .* expected"):
        chunks(text)


def test_long_text_is_cut_at_sentence_ends() -> None:
    pieces = chunks("one two three four five six seven. " * 100)
    assert all(len(piece) <= 30 and piece[-1].pause == "." for piece in pieces)
    assert sum(len(piece) for piece in pieces) == 700


# ---- timing ----


def test_rounding_by_the_running_sum_keeps_the_total() -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        durations = torch.rand(21, generator=rng) * 8 + 1
        is_word = torch.arange(21) % 2 == 1
        rounded = round_durations(durations, is_word)
        assert abs(int(rounded.sum()) - float(durations.sum())) <= 0.5 + 1e-4
        assert bool((rounded[is_word] >= 1).all())
    assert round_durations(torch.tensor([0.0, 0.1, 0.0]), torch.tensor([False, True, False])).tolist() == [0, 1, 0]


def test_frames_are_spread_evenly_over_the_characters() -> None:
    character, place = plan_frames(torch.tensor([1, 2, 1]), torch.tensor([1, 4, 0]))
    assert character.tolist() == [0, 1, 1, 2, 2]
    torch.testing.assert_close(place[1:, 0], torch.tensor([0.125, 0.375, 0.625, 0.875]))


def test_word_spans_follow_the_peaks_and_leave_out_silence() -> None:
    frames = torch.zeros(100, 80)
    frames[:10] = frames[45:60] = frames[90:] = -1.8
    frames += torch.linspace(0, 0.01, 100)[:, None]
    symbols = Characters().encode("ab cd")
    log_probs = torch.full((50, Characters.size), -10.0)
    log_probs[:, Characters.blank] = -0.1
    for step, symbol in zip((8, 15, 26, 33, 40), symbols, strict=True):
        log_probs[step, symbol] = 0.0
    assert word_spans(frames, log_probs, ["ab", "cd"]) == [(10.0, 45.0), (60.0, 90.0)]
    first, durations = unit_durations([(10.0, 45.0), (60.0, 90.0)], 33, 3, 2) or (0, [])
    assert first == 1 and durations == [2, 12, 5, 10, 2]
    assert unit_durations([(0.0, 1.0), (1.0, 1.0), (1.0, 1.0)], 2, 3, 2) is None


# ---- the Talker ----


def test_gradient_reaches_every_parameter() -> None:
    talker, batch = small_talker().train(), batch_of(["the red cat sat.", "a dog"])
    losses = talker_losses(talker, batch.text(), batch.plan(), batch.codes_BTK, batch.durations_BU)
    (losses.codes + losses.stop + losses.durations).backward()
    for name, parameter in talker.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


@torch.no_grad()
def test_blurred_targets_without_blur_are_the_codes_themselves() -> None:
    talker, batch = small_talker(), batch_of(["the red cat sat.", "a dog"])
    found = [
        talker_losses(talker, batch.text(), batch.plan(), batch.codes_BTK, batch.durations_BU, shares).codes
        for shares in (None, neighbour_shares(CODEBOOKS, 1e-3), neighbour_shares(CODEBOOKS, 2.0))
    ]
    torch.testing.assert_close(found[0], found[1])
    assert abs(float(found[2] - found[0])) > 1e-3


@torch.no_grad()
def test_step_by_step_decoding_equals_teacher_forcing() -> None:
    talker, text = small_talker(), "the red cat sat down."
    parts, durations = sentence(text)
    speaker = torch.nn.functional.normalize(torch.randn(1, 8), dim=-1)
    codes = generate_codes(talker, CODEBOOKS, [parts], speaker, durations=[torch.tensor(durations)])[0].codes_TK
    assert len(codes) > 2 * TALKER.window  # so that the attention window matters
    batch = batch_of([text], states=False)
    batch.speaker_BE, batch.codes_BTK[0, : len(codes)] = speaker, codes
    forced = talker(talker.encode_text(batch.text()), batch.text(), batch.plan(), batch.codes_BTK)
    assert torch.equal(forced.logits_BTKV[0, : len(codes)].argmax(-1), codes)


@torch.no_grad()
def test_batched_generation_equals_single() -> None:
    talker = small_talker()
    texts = [units(spoken_words(text)) for text in ("one", "a much longer sentence, with a pause.", "two words")]
    speakers = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    states = [torch.randn(len(row), 6) for row in texts]
    for sampling in (GREEDY, Sampling(temperature=1.0, top_k=5, seed=3)):
        together = generate_codes(talker, CODEBOOKS, texts, speakers, states, sampling)
        for row in range(3):
            one = slice(row, row + 1)
            alone = generate_codes(talker, CODEBOOKS, texts[one], speakers[one], states[one], sampling)[0]
            assert torch.equal(together[row].codes_TK, alone.codes_TK)
            torch.testing.assert_close(together[row].vectors_TD, alone.vectors_TD)


@torch.no_grad()
def test_drawn_codes_are_decoded_as_they_are_and_probable_ones_by_their_mean() -> None:
    talker, parts = small_talker(), [units(spoken_words("a much longer sentence."))]
    speaker = torch.nn.functional.normalize(torch.randn(1, 8), dim=-1)
    drawn = generate_codes(talker, CODEBOOKS, parts, speaker, sampling=Sampling(temperature=1.0))[0]
    exact = sum(CODEBOOKS[k][drawn.codes_TK[:, k]] for k in range(3))
    torch.testing.assert_close(drawn.vectors_TD, exact)
    talker.base_head.weight.mul_(1e4)  # a Talker that is sure of a code decodes that code
    for head in talker.depth_heads:
        head[-1].weight.mul_(1e4)
    sure = generate_codes(talker, CODEBOOKS, parts, speaker)[0]
    exact = sum(CODEBOOKS[k][sure.codes_TK[:, k]] for k in range(3))
    assert float((sure.vectors_TD - exact).abs().amax(-1).median()) < 1e-4


@torch.no_grad()
def test_text_speaker_and_states_change_the_codes() -> None:
    talker = small_talker()
    durations = [torch.tensor([0, 8, 0, 8, 0])]
    speaker, other = torch.nn.functional.normalize(torch.randn(2, 1, 8), dim=-1)
    states = [torch.randn(5, 6)]

    def say(parts: list[str], voice: torch.Tensor, states: list[torch.Tensor] | None = None) -> torch.Tensor:
        return talker_logits(talker, parts, voice, states, durations)

    words = [" ", "left", " ", "word", "."]
    base = say(words, speaker)
    assert torch.equal(base, say(words, speaker))
    for changed in (
        say([" ", "word", " ", "left", "."], speaker),  # shuffled
        say(words, other),
        say(words, speaker, states),
    ):
        assert float((changed - base).abs().max()) > 1e-3


def talker_logits(
    talker: Talker,
    parts: list[str],
    voice: torch.Tensor,
    states: list[torch.Tensor] | None,
    durations: list[torch.Tensor],
) -> torch.Tensor:
    batch = batch_of(["left word."], states=False)
    batch.symbols_BC, batch.unit_BC = unit_symbols([parts])
    plan = plan_batch([plan_frames(torch.tensor([len(part) for part in parts]), durations[0])])
    batch.speaker_BE, batch.states_BUD = voice, None if states is None else states[0][None]
    codes = torch.zeros(1, plan.character_BT.shape[1], 3, dtype=torch.long)
    return talker(talker.encode_text(batch.text()), batch.text(), plan, codes).logits_BTKV


@torch.no_grad()
def test_the_talker_sees_no_frame_ahead() -> None:
    talker, batch = small_talker(), batch_of(["the red cat sat down."])
    encoded = talker.encode_text(batch.text())
    before = talker(encoded, batch.text(), batch.plan(), batch.codes_BTK).logits_BTKV
    for t in (1, 5, 20):
        changed = batch.codes_BTK.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 16
        after = talker(encoded, batch.text(), batch.plan(), changed).logits_BTKV
        torch.testing.assert_close(after[:, :t], before[:, :t])
        torch.testing.assert_close(after[:, t, 0], before[:, t, 0])  # the base code of a frame sees only those before
        assert float((after[:, t, 1] - before[:, t, 1]).abs().max()) > 0  # the residual code sees the base code


def small_speech(voices: tuple[str, ...] = ("ann", "bob")) -> SpeechModel:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(codebook_size=16, dim=8)
    config = SpeechConfig(
        codec=CodecConfig(dim=16, num_layers=1, quantizer=quantizer),
        vocoder=VocoderConfig(dim=16, num_layers=1),
        speaker=SpeakerConfig(dim=16, embedding_dim=8),
        talker=TALKER,
        voices=voices,
    )
    return SpeechModel(config).eval()


# ---- stage D in miniature ----


def write_sounds(folder: Path, speakers: list[str] | None) -> Path:
    rng = np.random.default_rng(0)
    rows = [["wav", "text", "speaker"][: 3 if speakers else 2]]
    for number in range(20):
        seconds = 0.8 + 0.05 * number
        time_S = np.arange(int(16000 * seconds)) / 16000
        wave = 0.2 * np.sin(2 * np.pi * (150 + 30 * number) * time_S) + 0.02 * rng.standard_normal(len(time_S))
        soundfile.write(folder / f"{number}.wav", wave, 16000)
        row = [f"{number}.wav", ["a cat", "two dogs, here", "the sun"][number % 3]]
        rows.append(row + ([speakers[number % len(speakers)]] if speakers else []))
    with (folder / "tts.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    return folder / "tts.csv"


def write_inputs(folder: Path, speakers: list[str] | None) -> Path:
    manifest = write_sounds(folder, speakers)
    torch.manual_seed(0)
    shape = AudioEncoderConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=16)
    summary = {"kind": "audio_enc", "model_config": to_dict(shape), "total_step": 1}
    save_checkpoint(folder / "audio_enc.pt", {"weights": AudioEncoder(shape).state_dict(), "assets": {}}, summary)
    phase = {"max_steps": 4, "batch_size": 4, "lr": 0.002, "warmup_steps": 2}
    config = {
        "name": "talker_test",
        "data": {"train": str(manifest), "codec_frames": 48, "vocoder_frames": 24, "speaker_frames": 40},
        "audio_ckpt": str(folder / "audio_enc.pt"),
        "val_sentences": 1,
        "model": {
            "codec": {"dim": 16, "num_layers": 1, "quantizer": {"codebook_size": 16, "dim": 8}},
            "vocoder": {"dim": 16, "num_layers": 1},
            "speaker": {"dim": 16, "embedding_dim": 8},
            "talker": {"dim": 32, "num_layers": 1, "num_heads": 2, "hidden_dim": 32},
            "vocoder_kind": "istft",
        },
        "codec": phase | {"gradient_accumulation_steps": 2},
        "speaker": phase,
        "vocoder": phase,
        "talker": phase | {"max_steps": 6},
        "run": {"checkpoint_freq": 1, "val_freq": 3, "print_freq": 1, "keep_last": 3, "num_threads": 1},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def start(config: Path, save_dir: Path) -> Child:
    words = ("--config", config, "--save_dir", save_dir, "--device", "cpu")
    return start_module("train_talker", *words, log=save_dir.with_suffix(".log"))


def finish(process: Child) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def without_timing(save_dir: Path) -> list[dict[str, object]]:
    lines = (save_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines]


def test_all_phases_killed_and_resumed_equal_an_uninterrupted_run(tmp_path: Path) -> None:
    config = write_inputs(tmp_path, ["ann", "bob"])
    straight = start(config, tmp_path / "straight")
    broken = start(config, tmp_path / "broken")
    deadline = time.monotonic() + 300  # a busy machine
    # killed in the middle of the first phase, and once more in the last
    for step in (3, 11):
        while not (tmp_path / f"broken/talker_step_{step}.pt").exists() and broken.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        broken.send_signal(signal.SIGKILL)
        broken.wait()
        broken = start(config, tmp_path / "broken")
    assert "resuming from" in finish(broken)
    finish(straight)
    one, summary = load_checkpoint(tmp_path / "straight/talker.pt")
    two, _ = load_checkpoint(tmp_path / "broken/talker.pt")
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name]), name
    assert without_timing(tmp_path / "straight") == without_timing(tmp_path / "broken")
    model = speech_from_checkpoint(one, summary, "talker.pt")
    assert model.config.voices == ("ann", "bob")
    assert float(model.voices_NE.norm(dim=1).min()) > 0.99
    assert summary["lineage"].keys() == {"data", "audio_enc", "thinker", "tokenizer"}
    assert from_dict(SpeechConfig, summary["model_config"], "") == model.config


def test_voices_without_a_speaker_column_are_one_speaker(tmp_path: Path) -> None:
    voices = Voices(read_speech_manifest(write_sounds(tmp_path, None)), MelConfig())
    assert voices.names == [""] and voices.partner(0, None) == 1
    pairs, crops, rng = Pairs(voices, 40), WaveCrops(voices, 24), np.random.default_rng(0)
    batch = pairs.collate([pairs.sample(index, rng) for index in range(3)])
    assert batch.speaker_B.tolist() == [0, 1, 2]  # recordings stand in for speakers
    assert batch.first_BFM.shape == batch.second_BFM.shape == (3, 40, 80)
    sounds = crops.collate([crops.sample(index, rng) for index in range(3)])
    assert sounds.frames_BFM.shape == (3, 24, 80) and sounds.wave_BS.shape == (3, 24 * 160)


def test_what_stage_d_aligned_and_encoded_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make_spans(*_: object) -> list[list[tuple[float, float]] | None]:
        made.append("spans")
        return [[(0.0, 12.5)], None, [(1.0, 2.0), (2.0, 3.0)]]

    def make_codes(*_: object) -> list[torch.Tensor]:
        made.append("codes")
        return [torch.arange(6).view(3, 2)] * 3

    monkeypatch.setattr(alignment, "_align", make_spans)
    monkeypatch.setattr(alignment, "encode_recordings", make_codes)
    theirs, ours = tmp_path / "d", tmp_path / "e"
    voices = Voices(read_speech_manifest(write_sounds(tmp_path, None)), MelConfig())
    encoder: Any = torch.nn.Linear(2, 2)
    model = small_speech()
    first = alignment.align(encoder, voices, [theirs])
    codes, embeddings_NE = alignment.codes_and_embeddings(model, voices, [theirs])
    assert alignment.align(encoder, voices, [ours, theirs]) == first == make_spans()
    again, same_NE = alignment.codes_and_embeddings(model, voices, [ours, theirs])
    assert all(torch.equal(a, b) for a, b in zip(codes, again, strict=True)) and torch.equal(embeddings_NE, same_NE)
    assert made == ["spans", "codes", "spans"] and not ours.exists()  # the last one is this test's own
    for damaged in (b"", b"PK\x03\x04 cut", next(theirs.glob("alignment-*")).read_bytes()[:-40]):
        next(theirs.glob("alignment-*")).write_bytes(damaged)
        assert alignment.align(encoder, voices, [theirs]) == first
    assert made[3:] == ["spans"] * 3  # computed again, and whole again on the disk
    torch.nn.init.zeros_(encoder.weight)  # another encoder
    alignment.align(encoder, voices, [ours, theirs])
    voices.paths[0].write_bytes(voices.paths[0].read_bytes() + b"0")  # a changed recording
    alignment.codes_and_embeddings(model, voices, [ours, theirs])
    assert made[6:] == ["spans", "codes"] and len(list(ours.iterdir())) == 2
