"""What grades speech: slips of words, distortion of sound, everyone who listens, and sampling rates that differ."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni.audio import SILENCE, MelConfig, log_mel
from omni.config import Problem
from omni.data.speech import read_speech_manifest
from omni.data.voices import Voices
from omni.evaluate import audio_enc, speech_validation
from omni.evaluate.audio_enc import hear, hear_recordings
from omni.evaluate.codec import codec_figures
from omni.evaluate.sample_speech import show_speaking
from omni.evaluate.speech_errors import mel_cepstral_distortion, slips
from omni.evaluate.speech_validation import clearest_voice
from omni.evaluate.talker import Graders, SpeechSets, talker_figures
from omni.generate_speech import speak
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from omni.models.codec import CodecConfig
from omni.models.quantizer import QuantizerConfig
from omni.models.speaker import SpeakerConfig
from omni.models.speech import SpeechConfig, SpeechModel
from omni.models.talker import TalkerConfig
from omni.models.vocoder import VocoderConfig
from omni.streaming import stream_speech

WIDE = MelConfig(sample_rate=24000, n_fft=1024, hop_length=240)


def speech_model(mel: MelConfig | None = None, kind: str = "istft", **talker: int) -> SpeechModel:
    torch.manual_seed(0)
    config = SpeechConfig(
        mel=mel or MelConfig(),
        codec=CodecConfig(dim=16, num_layers=1, quantizer=QuantizerConfig(3, codebook_size=16, dim=8)),
        vocoder=VocoderConfig(dim=16, num_layers=1),
        speaker=SpeakerConfig(dim=16, embedding_dim=8),
        talker=TalkerConfig(dim=32, num_layers=1, num_heads=2, hidden_dim=32, **talker),
        vocoder_kind=kind,  # type: ignore[arg-type]
        voices=("ann", "bob"),
    )
    return SpeechModel(config).eval()


def recognizer(mixing: str = "attention") -> AudioEncoder:
    torch.manual_seed(1)
    shape = AudioEncoderConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=16, mixing=mixing)  # type: ignore[arg-type]
    return AudioEncoder(shape).eval()


def manifest(folder: Path, texts: list[str], rate: int = 16000) -> Path:
    rows = [["wav", "text", "speaker"]]
    for number, text in enumerate(texts):
        time_S = np.arange(int(rate * (0.5 + 0.1 * number))) / rate
        soundfile.write(folder / f"{number}.wav", 0.2 * np.sin(2 * np.pi * (200 + 90 * number) * time_S), rate)
        rows.append([f"{number}.wav", text, ["ann", "bob"][number % 2]])
    with (folder / "tts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "tts.csv"


# ---- slips ----


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ("the red cat sat down", set()),
        ("the bed cat sat down", set()),  # heard wrongly, but said
        ("the red red cat sat down", {"repeats"}),
        ("the the red cat sat down", {"repeats"}),
        ("the cat sat down", {"skips"}),
        ("the red cat sat", {"skips", "early_stops"}),
        ("the red cat sat down there", {"late_stops"}),
        ("the red cat sat down down", {"repeats", "late_stops"}),
        ("the red blue cat sat down", set()),  # a word too many, which is no repeat
        ("", {"skips", "early_stops"}),
    ],
)
def test_slips_are_told_apart(heard: str, expected: set[str]) -> None:
    found = slips(["The red cat sat down."], [heard])
    assert {name for name, figure in found.items() if figure.value} == expected
    assert set(found) == {"repeats", "skips", "early_stops", "late_stops"}


def test_slips_are_shares_of_sentences() -> None:
    found = slips(["a b c"] * 4, ["a b c", "a b", "a b c", "a c"])
    assert found["skips"].value == 0.5 and found["early_stops"].value == 0.25 and found["skips"].n == 4


# ---- distortion ----


def plain_distortion(made: torch.Tensor, true: torch.Tensor) -> float:
    """The same by its definition, cell by cell."""

    def cepstra(frames: torch.Tensor) -> np.ndarray:
        logs = np.log(np.maximum(np.exp(frames.double().numpy() * 3.0 - 2.2) - 1e-5, 0) + 1e-5)
        n = np.arange(80)
        return np.array([[np.mean(row * np.cos(np.pi * d * (n + 0.5) / 80)) for d in range(1, 14)] for row in logs])

    a, b = cepstra(made), cepstra(true)
    best: dict[tuple[int, int], tuple[float, float, int]] = {}
    for i in range(len(a)):
        for j in range(len(b)):
            cost = float(np.linalg.norm(a[i] - b[j]))
            before = [best[at] for at in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if at in best]
            total, _, count = min(before, default=(0.0, 0.0, 0))
            best[i, j] = (total + cost, 0.0, count + 1)
    total, _, count = best[len(a) - 1, len(b) - 1]
    return 10 / math.log(10) * math.sqrt(2) * total / count


def test_distortion_is_that_of_its_definition() -> None:
    torch.manual_seed(0)
    for sizes in ((1, 1), (12, 9), (7, 15), (1, 6)):
        made, true = (torch.randn(size, 80) * 0.5 for size in sizes)
        assert mel_cepstral_distortion(made, true, MelConfig()) == pytest.approx(plain_distortion(made, true), rel=1e-5)


def test_distortion_forgives_timing_and_not_sound() -> None:
    torch.manual_seed(0)
    frames = torch.randn(30, 80).cumsum(0) / 5
    slower = frames.repeat_interleave(2, dim=0)
    assert mel_cepstral_distortion(frames, frames, MelConfig()) == pytest.approx(0, abs=1e-5)
    assert mel_cepstral_distortion(slower, frames, MelConfig()) == pytest.approx(0, abs=1e-5)
    louder = frames + 0.1  # the level is no part of it
    assert mel_cepstral_distortion(louder, frames, MelConfig()) < 0.3
    assert mel_cepstral_distortion(frames.flip(1), frames, MelConfig()) > 3


# ---- everyone who listens ----


@pytest.mark.parametrize("kind", ["istft", "griffin_lim"])
def test_all_figures_of_the_protocol(tmp_path: Path, kind: str) -> None:
    texts = ["a red cat.", "one two three four five six seven.", "the end.", "big dog, small dog."]
    path = manifest(tmp_path, texts)
    model = speech_model(kind=kind)
    graders = Graders(recognizer(), recognizer("convolution"))
    found = talker_figures(model, graders, SpeechSets(path, words=path, voices=path, shuffled=path, limit=3))
    rates = {f"cer{who}{part}{judge}" for who in ("", "_recordings") for judge in ("", "_judge")
             for part in ("", "_unseen_words", "_unseen_voices", "_shuffled")}  # fmt: skip
    others = {"wer", "cer_short", "cer_medium", "repeats", "skips", "early_stops", "late_stops",
              "speaker_similarity", "speaker_nearer", "speaker_nearer_unseen_voices", "length_outliers", "mcd", "rtf",
              "first_audio_ms"}  # fmt: skip
    beside = {f"{name}_recordings" for name in ("repeats", "skips", "early_stops", "late_stops")}
    assert set(found) == rates | others | beside
    assert found["cer"].n == 3 and found["cer_short"].n == 2 and found["cer_medium"].n == 1
    assert 0 < found["first_audio_ms"].value < 10_000 and found["rtf"].value > 0
    alone = talker_figures(model, Graders(recognizer()), SpeechSets(path, limit=2))
    assert not {name for name in alone if "judge" in name or "unseen" in name}
    assert "cer_shuffled" in alone and "cer_recordings_shuffled" not in alone  # of what is shuffled here
    assert alone["cer"].value == pytest.approx(found["cer"].value, abs=1)


def test_figures_of_the_codec(tmp_path: Path) -> None:
    model = speech_model()
    found = codec_figures(model, recognizer(), manifest(tmp_path, ["a red cat.", "the end."]))
    assert set(found) == {"mel_l1", "mel_l1_by_codebooks", "usage", "perplexity", "bits_per_second",
                          "bits_per_second_carried", "mel_l1_vocoder",
                          "cer_resynthesis", "cer_vocoder", "cer_recordings"}  # fmt: skip
    assert found["bits_per_second"].value == pytest.approx(3 * 4 * 100 / 3)  # codebooks x bits x frames a second
    by_codebooks = found["mel_l1_by_codebooks"].value
    assert isinstance(by_codebooks, list) and len(by_codebooks) == 3 and by_codebooks[-1] == found["mel_l1"].value
    carried, perplexity = found["bits_per_second_carried"].value, found["perplexity"].value
    assert isinstance(perplexity, list)
    assert carried == pytest.approx(sum(math.log2(value) for value in perplexity) * 100 / 3)


def test_the_two_speaker_encoders_are_two() -> None:
    model = speech_model()
    assert not torch.equal(model.speaker.out_proj.weight, model.grader.out_proj.weight)


def test_samples_can_be_seen_and_heard(tmp_path: Path) -> None:
    model, out = speech_model(), tmp_path / "out"
    out.mkdir()
    path = manifest(tmp_path, ["a red cat.", "the end.", "big dog."])
    voices = Voices(read_speech_manifest(path)[:2], model.config.mel)
    *spoken, codes = show_speaking(model, recognizer(), voices, out)
    assert [len(sample.files) for sample in spoken] == [5, 5] and all(file.exists() for file in spoken[1].files)
    assert len(codes.texts) == 3 and codes.files == [out / "codes.jpg"]
    with Image.open(tmp_path / "out/sample_1.jpg") as picture:
        assert picture.size[0] > 400 and len(set(picture.convert("L").tobytes())) > 50  # something was drawn
    recording, rate = soundfile.read(tmp_path / "out/sample_2_recording.ogg")
    assert rate == 16000 and abs(len(recording) / rate - 0.6) < 0.02
    for kind in ("vocoder", "codec", "talker"):
        wave, _ = soundfile.read(tmp_path / f"out/sample_2_{kind}.ogg")
        assert float(np.abs(wave).max()) > 0.01


# ---- codebooks ----


@torch.no_grad()
def test_a_talker_may_write_fewer_codebooks_than_the_codec_has() -> None:
    model = speech_model(num_codebooks=2)
    assert model.codebooks.shape == (2, 16, 8)
    spoken = speak(model, ["a cat."], torch.randn(1, 8))[0]
    assert spoken.codes_TK.shape[1] == 2
    config = SpeechConfig(talker=TalkerConfig(num_codebooks=3))
    assert (
        Problem("talker.num_codebooks", "3", "at most codec.quantizer.num_codebooks (2); 0: all") in config.problems()
    )


# ---- sampling rates ----


def test_speech_at_24_khz_is_aligned_and_heard_at_the_recognizers_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = manifest(tmp_path, ["a red cat.", "the end.", "big dog."], rate=24000)
    wide, narrow = (Voices(read_speech_manifest(path), mel) for mel in (WIDE, MelConfig()))
    for index in range(3):
        # kept in half precision, or computed anew
        torch.testing.assert_close(wide.frames_as(MelConfig(), index), narrow.frames(index), atol=2e-3, rtol=0)
        assert abs(len(wide.frames(index)) - len(narrow.frames(index))) <= 1  # one frame rate
        assert float((wide.frames(index).mean() - narrow.frames(index).mean()).abs()) < 1
    encoder: Any = recognizer()
    assert len(hear_recordings(encoder, wide)) == 3 and len(hear_recordings(encoder, wide, limit=2)) == 2
    monkeypatch.setattr(audio_enc, "transcribe", lambda _, frames: frames)
    found = hear(encoder, [wide.samples(index) for index in range(3)], 24000)
    for frames, index in zip(found, range(3), strict=True):
        expected: Any = narrow.frames(index)
        assert float((frames - expected).abs().mean()) < 0.2  # where a tone is not, resampling leaves other traces


@torch.no_grad()
def test_speech_at_24_khz_streams_as_well() -> None:
    model = speech_model(WIDE)
    model.vocoder.out_proj.weight[model.vocoder.num_bins :] *= 50
    voice = torch.nn.functional.normalize(torch.randn(8), dim=-1)
    whole = speak(model, ["a red cat, and a dog."], voice[None])[0]
    assert len(whole.wave) == len(whole.frames_FM) * 240
    streamed = torch.cat(list(stream_speech(model, "a red cat, and a dog.", voice)))
    assert float((streamed - whole.wave).abs().max()) <= 1e-3 * float(whole.wave.abs().max())
    silence = log_mel(WIDE)(torch.zeros(24000))
    assert len(silence) == 100 and float(silence.mean()) == pytest.approx(SILENCE, abs=1e-4)


def test_the_voice_that_is_understood_best_speaks_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = speech_model(), list[str]()
    with torch.no_grad():
        model.voices_NE.copy_(torch.randn(2, 8))

    def hears_bob(encoder: Any, waves: list[torch.Tensor], rate: int) -> list[str]:
        half = len(said) // 2
        return ["x" * len(text) for text in said[:half]] + said[half:]

    def notes(model: SpeechModel, texts: list[str], speaker_BE: torch.Tensor, mind: Any) -> Any:
        said.extend(texts)
        half = len(texts) // 2
        assert torch.equal(speaker_BE, model.voices_NE.repeat_interleave(half, 0))
        return speak(model, texts, speaker_BE, mind)

    monkeypatch.setattr(speech_validation, "hear", hears_bob)
    monkeypatch.setattr(speech_validation, "speak", notes)
    texts = ["a red cup.", "yes.", "?", "yes.", *(f"this is far too long for number {'o' * n}" for n in range(12))]
    assert (model.default_voice, clearest_voice(model, recognizer(), texts, None)) == ("ann", 1)
    assert said[:2] == ["yes.", "a red cup."] and len(said) == 24
    model.clearest.fill_(1)
    assert model.default_voice == "bob" and torch.equal(model.voice(None), model.voice("bob"))
    assert "clearest" in model.state_dict()  # a checkpoint knows it
