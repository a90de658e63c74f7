"""Recordings and pictures as people have them: valid oddities mean the same, the rest is named before it is decoded."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni.audio import MelConfig, load_audio, recording_seconds
from omni.config import DataConfig, UserError
from omni.data.dialogue import read_chats
from omni.data.images import Pictures, load_image, read_image_manifest, read_image_size
from omni.data.speech import Augmentation, Recordings, Transcribed, read_speech_manifest
from omni.files import describe_content

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"


def speech_like(rate: int, seconds: float = 2.0) -> np.ndarray:
    """A sound below 3 kHz whose level and pitch change."""
    time = np.arange(int(rate * seconds)) / rate
    sweep = np.sin(2 * np.pi * (300 * time + 350 * time**2)) + 0.5 * np.sin(2 * np.pi * 170 * time)
    return 0.3 * sweep * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time))


def six_channels(wave: np.ndarray) -> np.ndarray:
    return np.stack([wave] * 6, 1)


ODDITIES: dict[str, tuple[str, int, str, str, Callable[[np.ndarray], np.ndarray]]] = {
    "8-bit": ("x.wav", 16000, "WAV", "PCM_U8", np.asarray),
    "24-bit": ("x.wav", 16000, "WAV", "PCM_24", np.asarray),
    "32-bit": ("x.wav", 16000, "WAV", "PCM_32", np.asarray),
    "float": ("x.wav", 16000, "WAV", "FLOAT", np.asarray),
    "double": ("x.wav", 16000, "WAV", "DOUBLE", np.asarray),
    "A-law": ("x.wav", 16000, "WAV", "ALAW", np.asarray),
    "44.1 kHz stereo": ("x.wav", 44100, "WAV", "PCM_16", lambda wave: np.stack([wave, wave], 1)),
    "one silent side": ("x.wav", 44100, "WAV", "PCM_16", lambda wave: np.stack([wave, 0 * wave], 1)),
    "six channels": ("x.wav", 48000, "WAVEX", "PCM_24", six_channels),
    "RF64": ("x.wav", 16000, "RF64", "PCM_16", np.asarray),
    "FLAC": ("x.flac", 22050, "FLAC", "PCM_24", np.asarray),
    "Vorbis": ("x.ogg", 44100, "OGG", "VORBIS", np.asarray),
    "Opus": ("x.opus", 48000, "OGG", "OPUS", np.asarray),
    "MP3": ("x.mp3", 44100, "MP3", "MPEG_LAYER_III", lambda wave: np.stack([wave, wave], 1)),
    "MP3 named wav": ("x.wav", 16000, "MP3", "MPEG_LAYER_III", np.asarray),
    "FLAC named mp3": ("x.mp3", 16000, "FLAC", "PCM_16", np.asarray),
    "WAV without a suffix": ("x", 16000, "WAV", "PCM_16", np.asarray),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_every_way_to_store_a_recording_means_the_same(name: str, tmp_path: Path) -> None:
    file, rate, container, subtype, shape = ODDITIES[name]
    soundfile.write(tmp_path / "reference.wav", speech_like(16000), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / file, shape(speech_like(rate)), rate, format=container, subtype=subtype)
    assert recording_seconds(tmp_path / file) == pytest.approx(2.0, abs=0.1)
    expected, found = load_audio(tmp_path / "reference.wav"), load_audio(tmp_path / file)
    shift = best_shift(expected, found)  # lossy codecs add a little silence
    assert abs(shift) <= (1700 if "MP3" in name else 16)
    size = min(len(expected), len(found)) - 2 * abs(shift)
    a, b = expected[max(0, -shift) :][:size], found[max(0, shift) :][:size]
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.99
    assert float(b.square().mean() / a.square().mean()) == pytest.approx(1, abs=0.1)


def best_shift(a: torch.Tensor, b: torch.Tensor) -> int:
    """By how many samples ``b`` is late."""
    size = 2 * max(len(a), len(b))
    correlation = torch.fft.irfft(torch.fft.rfft(b, size) * torch.fft.rfft(a, size).conj(), size)
    at = int(correlation.argmax())
    return at if at < size // 2 else at - size


# ---- recordings that are not whole ----


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.1])
@pytest.mark.parametrize("name", [name for name in ODDITIES if name not in ("double", "A-law", "one silent side")])
def test_cut_off_recordings_are_named(name: str, keep: float, tmp_path: Path) -> None:
    file, rate, container, subtype, shape = ODDITIES[name]
    path = tmp_path / file
    soundfile.write(path, shape(speech_like(rate)), rate, format=container, subtype=subtype)
    load_audio(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=r"cut off|not a readable recording"):
        load_audio(path)


def test_sizes_that_a_stream_left_open_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, speech_like(16000), 16000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        data[4:8] = data[at : at + 4] = struct.pack("<I", size)
        path.write_bytes(data)
        assert len(load_audio(path)) == 32000
    # what follows the samples is no part of them
    soundfile.write(path, speech_like(16000), 16000)
    path.write_bytes(path.read_bytes() + b"LIST\x04\0\0\0INFO")
    assert len(load_audio(path)) == 32000


def test_a_flac_that_was_written_to_a_pipe_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "x.flac"
    soundfile.write(path, speech_like(16000), 16000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert len(load_audio(path)) == 32000 and recording_seconds(path) == 2
    assert len(load_audio(io.BytesIO(data))) == 32000
    for read in (load_audio, recording_seconds):
        with pytest.raises(UserError, match="expected at most 1 s"):
            read(path, max_seconds=1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (POINTER, "a Git LFS pointer, .* `git lfs pull`"),
        (PAGE, "an HTML page; the download failed"),
        (b'{"error": "not found"}', "text that begins with"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG picture"),
        (b"\0\0\0\x20ftypM4A " + bytes(40), "an MP4, M4A"),
        (bytes(range(256)), "bytes of no kind known"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "a WAV recording, which cannot be decoded"),
    ],
)
def test_what_is_no_recording_is_described(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(content)
    for read in (load_audio, recording_seconds):
        with pytest.raises(UserError, match=rf"x\.wav: not a readable recording \(found {expected}"):
            read(tmp_path / "x.wav")


def test_an_hour_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "hour.flac", np.zeros(3600 * 8000, dtype=np.int16), 8000)
    (tmp_path / "x.csv").write_text("wav,text\nhour.flac,a\n")
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"x\.csv:2: .*found 3600.0 s of sound, expected at most 30 s"):
        Recordings(read_speech_manifest(tmp_path / "x.csv"), MelConfig())
    with pytest.raises(UserError, match="expected at most 100 s"):
        load_audio(tmp_path / "hour.flac", max_seconds=100)


def test_bad_recordings_are_all_listed_or_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        soundfile.write(tmp_path / f"{name}.wav", speech_like(16000, 0.5), 16000)
    soundfile.write(tmp_path / "b.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "d.flac", speech_like(16000), 16000)
    data = (tmp_path / "d.flac").read_bytes()
    (tmp_path / "d.wav").write_bytes(data[: len(data) // 2])
    (tmp_path / "x.csv").write_text("wav,text,speaker\na.wav,one,s\nb.wav,two,s\nc.wav,three,s\nd.wav,four,s\n")
    rows = read_speech_manifest(tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"x\.csv:3: .*found NaN or Inf(.|\n)*x\.csv:5: .*cut off"):
        Recordings(rows, MelConfig())
    skip = DataConfig(on_bad_sample="skip", max_bad_fraction=0.5)
    found = Transcribed(rows, MelConfig(), lambda frames: frames, Augmentation(), "training", skip)
    assert [found.sample(index, None)[2] for index in range(len(found))] == ["one", "three"]
    assert found.recordings.left_out == 2
    assert len(found.symbols) == 2 and found.sample(1, None)[1] == found.symbols[1]
    with pytest.raises(UserError, match=r"2 of 4 samples cannot be used, expected at most 0\.05"):
        Recordings(rows, MelConfig(), DataConfig(on_bad_sample="skip"))


def test_recordings_beyond_the_memory_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", speech_like(16000, 0.5), 16000)
    (tmp_path / "x.csv").write_text("wav,text\na.wav,one\nb.wav,two\nc.wav,three\n")
    rows = read_speech_manifest(tmp_path / "x.csv")
    kept = Recordings(rows, MelConfig())
    monkeypatch.setattr("omni.data.speech.CACHE_BYTES", 2 * 80 * 60)
    some = Recordings(rows, MelConfig())
    assert (len(kept._kept), len(some._kept)) == (3, 1) and kept.num_frames == some.num_frames == [50] * 3
    assert all(torch.equal(kept.frames(index), some.frames(index)) for index in range(3))


# ---- pictures ----


def png(width: int, height: int) -> bytes:
    """A PNG whose header says how large it is, and that holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (POINTER, "a Git LFS pointer"),
        (PAGE, "an HTML page"),
        (b"", "found an empty file"),
        (b"fLaC" + bytes(40), "a FLAC recording"),
        (b"%PDF-1.7", "a PDF document"),
        (png(8, 8), "a PNG picture: "),
        (png(8001, 8000), "found 8001 x 8000 pixels, expected at most 64000000"),
        (png(2**31 - 1, 2**31 - 1), "found 2147483647 x 2147483647 pixels"),
    ],
)
def test_what_is_no_picture_is_described(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.png: .*{expected}") as caught:
        load_image(tmp_path / "x.png", 8)
    assert "expected" in str(caught.value)


def test_a_large_picture_is_decoded_where_that_is_allowed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("L", (20_000, 10_000)).save(tmp_path / "x.png")  # more than Pillow's own limit
    with pytest.raises(UserError, match="20000 x 10000"):
        read_image_size(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png", 8, max_pixels=200_000_000).max() == 0
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LAB"])
def test_one_pixel_of_any_mode_is_a_picture(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (1, 1)).save(tmp_path / "x.tif")
    assert load_image(tmp_path / "x.tif", 8).shape == (3, 8, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_cut_off_pictures_are_named(suffix: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    noise.save(tmp_path / f"x.{suffix}")
    data = (tmp_path / f"x.{suffix}").read_bytes()
    for keep in (0.95, 0.5, 0.05):
        (tmp_path / f"y.{suffix}").write_bytes(data[: int(keep * len(data))])
        for size in (8, 64):
            with pytest.raises(UserError, match=rf"y\.{suffix}: not a readable picture"):
                load_image(tmp_path / f"y.{suffix}", size)


def test_bad_pictures_are_left_out_where_the_rules_say_so(tmp_path: Path) -> None:
    for number, shade in enumerate((10, 20, 30)):
        Image.new("L", (4, 4), shade).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:45])
    entries = [{"image": f"{number}.png", "caption": f"number {number}"} for number in range(3)]
    (tmp_path / "x.json").write_text(json.dumps(entries))
    rows = read_image_manifest(tmp_path / "x.json")
    found = Pictures(rows, 4, DataConfig(on_bad_sample="skip", max_bad_fraction=0.5))
    assert [row.values["caption"] for row in found.rows] == ["number 0", "number 2"]
    assert [int(found.pixels(index).max()) for index in range(len(found))] == [10, 30]


def test_media_of_chats_have_limits(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.flac", np.zeros(31 * 8000), 8000)
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000))
    lines = []
    for kind, name in (("audio", "long.flac"), ("image", "bomb.png")):
        content = [{"type": kind, kind: name}]
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"x\.jsonl:1: .*31.0 s of sound(.|\n)*x\.jsonl:2: .*30000 x 30000 pixels"):
        read_chats(tmp_path / "x.jsonl")
    chats = read_chats(tmp_path / "x.jsonl", DataConfig(max_audio_seconds=60, max_pixels=10**9))
    assert len(chats) == 2


def test_content_is_described_without_its_name(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.png", np.zeros(100), 8000, format="WAV")
    assert describe_content(tmp_path / "a.png") == "a WAV recording"
    assert describe_content(tmp_path / "nothing") == "no such file"
    assert describe_content(tmp_path) == "a folder"
