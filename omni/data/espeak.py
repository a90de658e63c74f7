"""Voices of the micro-world: espeak-ng, loaded at run time in worker processes.

The library is GPL-3 and keeps state between calls - the same text gives other samples the second time - so it lives in
processes of its own, and every utterance is spoken by a fresh fork of a process that has only chosen its voice. That
makes a recording a pure function of (text, voice, rate, seed), whatever the number of workers and whatever came before.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import select
import struct
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from omni.config import UserError

if TYPE_CHECKING:
    import numpy as np

SAMPLE_RATE = 16_000
ESPEAK_RATE = 22_050  # every formant voice; checked when the library starts
REMEDY = "espeak-ng is not installed: run `uv sync --extra synth` (package espeakng-loader) to synthesize speech."

ACCENTS = {
    "us": "en-us",
    "gb": "en",  # the voice file's own name, `en-gb`, is refused by espeakng-loader 0.2.4
    "rp": "en-gb-x-rp",
    "scot": "en-gb-scotland",
    "carib": "en-029",
    "lanc": "en-gb-x-gbclan",
    "mid": "en-gb-x-gbcwmd",
    "nyc": "en-us-nyc",
}
PITCHES = {"low": 36, "mid": 50, "high": 66}
# The first ones differ most in sound: the sizes take their Talker voices from the front.
TRAIN_VOICES = """
    us-f2-mid us-m3-low rp-f5-high scot-m7-mid nyc-m1-low gb-f3-low carib-m6-mid us-f4-high
    rp-m8-low lanc-f1-mid us-m2-high scot-f2-low gb-m4-mid us-f3-high mid-m3-high nyc-f5-mid
    us-m7-low rp-f2-low gb-m1-high lanc-m6-low carib-f4-mid us-f1-low scot-m3-high rp-m4-low
    nyc-f3-mid us-m8-mid gb-f5-low mid-f2-high lanc-m7-high rp-f1-high us-m6-high carib-m2-low
    scot-f5-mid gb-m3-low nyc-m4-high us-f5-low rp-m7-mid mid-m1-mid lanc-f4-low us-m4-mid
    gb-f2-high carib-f3-high scot-m8-low rp-m6-high nyc-f1-high us-m1-high mid-f3-low lanc-m2-mid
""".split()  # noqa: SIM905 - a table of names
# Four with timbres that no training voice has, four with a known timbre in an accent it was never heard in.
UNSEEN_VOICES = """
    us-annie-mid rp-mike-mid gb-andrea-low scot-alex-high nyc-m3-mid mid-f5-high carib-m8-high lanc-f2-low
""".split()  # noqa: SIM905
# For the judge of speech output, who shall have heard neither what the Talker nor what stage B heard.
JUDGE_VOICES = """
    rp-m2-low lanc-m1-mid scot-f1-high nyc-m7-low mid-m6-mid carib-f2-high gb-m8-low gb-f4-mid
    carib-f5-high mid-m4-low scot-f3-mid lanc-m3-high rp-m3-low nyc-f4-mid nyc-m8-high rp-f3-low
    lanc-m4-mid scot-m6-high mid-m7-low carib-f1-mid gb-m2-high carib-m1-low lanc-f5-mid nyc-f2-high
""".split()  # noqa: SIM905
_VARIANTS = {"annie": "Annie", "mike": "Mike", "andrea": "Andrea", "alex": "Alex"}
_VOICE = re.compile(rf"({'|'.join(ACCENTS)})-([a-z0-9]+)-({'|'.join(PITCHES)})")

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples by callback, no audio device
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report an error instead of exit(1)
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_UTF8 = 1  # espeakCHARS_UTF8
_SILENCE = 10 ** (-45 / 20)  # relative to the loudest sample; the quietest fricatives stand above -40 dB
_MARGIN = 0.06  # seconds of silence kept on each side


@dataclass(frozen=True)
class Voice:
    """What espeak-ng needs to know to sound like one speaker."""

    espeak: str
    rate: int
    pitch: int


@dataclass(frozen=True)
class Job:
    """One utterance to record."""

    text: str
    voice: str
    path: str
    rate_scale: float = 1.0
    seed: int = 0


def voice_settings(name: str) -> Voice:
    """Return the voice that a name such as `us-f2-high` (accent, variant, pitch) stands for."""
    match = _VOICE.fullmatch(name)
    if match is None:
        raise ValueError(
            f"voice {name!r}: expected accent-variant-pitch such as 'us-f2-high', "
            f"accent one of {', '.join(ACCENTS)}, pitch one of {', '.join(PITCHES)}"
        )
    accent, variant, pitch = match.groups()
    digest = hashlib.sha256(name.encode()).digest()
    rate = 112 + digest[0] % 32  # words a minute: 14 characters a second, as people speak; the default of 175 has 20
    return Voice(f"{ACCENTS[accent]}+{_VARIANTS.get(variant, variant)}", rate, PITCHES[pitch] + digest[1] % 7 - 3)


def require() -> None:
    """Raise UserError unless speech can be synthesized here."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise UserError(REMEDY)
    if not hasattr(os, "fork"):
        raise UserError("speech synthesis forks a process an utterance and so needs Linux or macOS (or WSL).")


def speak_all(jobs: Sequence[Job], processes: int | None = None) -> Speaking:
    """Start recording all jobs in worker processes; `wait()` on the result for their lengths in seconds."""
    require()
    return Speaking(jobs, processes or min(os.cpu_count() or 1, 16))


class Speaking:
    """Workers that record; a context manager, so that none outlives an interruption."""

    def __init__(self, jobs: Sequence[Job], processes: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="omni-")
        self._workers: list[subprocess.Popen[str]] = []
        # numpy's threads would be copied by each fork and serve nothing here
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
        for number, share in enumerate(_shares(jobs, processes)):
            todo = Path(self._folder.name) / f"{number}.json"
            todo.write_text(json.dumps([asdict(job) for job in share]), encoding="utf-8")
            command = [sys.executable, "-m", "omni.data.espeak", str(todo)]
            # The pipe to stdin carries nothing: it closes when this process dies, and the worker stops.
            self._workers.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    text=True, env=environment,
                )
            )  # fmt: skip

    def __enter__(self) -> Speaking:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        self._folder.cleanup()

    def wait(self) -> dict[str, float]:
        """Return seconds by path when everything is recorded."""
        seconds: dict[str, float] = {}
        for worker in self._workers:
            assert worker.stdout is not None and worker.stderr is not None
            output = worker.stdout.read()  # not communicate(): it would close stdin, which means "stop"
            errors = worker.stderr.read()  # after stdout: a worker writes a few lines here at most
            if worker.wait() != 0:
                first = errors.strip().splitlines()[:1] or ["no message"]  # the fork's own words come first
                raise RuntimeError(f"speech synthesis failed (exit code {worker.returncode}): {first[0]}")
            seconds.update(json.loads(output))
        return seconds


def _python_path() -> str:
    """Let a worker import this package wherever it is started."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)


def _shares(jobs: Iterable[Job], processes: int) -> list[list[Job]]:
    """Deal the jobs out, a voice's jobs in few pieces: choosing a voice costs more than a sentence."""
    by_voice: dict[str, list[Job]] = {}
    for job in jobs:
        by_voice.setdefault(job.voice, []).append(job)
    pieces = [own[i : i + 64] for own in by_voice.values() for i in range(0, len(own), 64)]
    pieces.sort(key=lambda piece: -sum(len(job.text) + 40 for job in piece))  # 40: the fork, in characters of speech
    shares: list[list[Job]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for piece in pieces:
        lightest = loads.index(min(loads))
        shares[lightest].extend(piece)
        loads[lightest] += sum(len(job.text) + 40 for job in piece)
    return [share for share in shares if share]


# ---------------------------------------------------------------------------------------------- inside a worker process


class Library:
    """espeak-ng itself. `speak` may be called once a process if the result is to depend on nothing else."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise RuntimeError(REMEDY) from error
        self._api = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        self._folder = tempfile.TemporaryDirectory(prefix="es")
        # A data path over about 160 characters makes the library fail: give it a short one.
        link = Path(self._folder.name) / "espeak-ng-data"
        link.symlink_to(espeakng_loader.get_data_path(), target_is_directory=True)
        rate = self._api.espeak_Initialize(_SYNCHRONOUS, 0, self._folder.name.encode(), _DONT_EXIT)
        if rate != ESPEAK_RATE:
            raise RuntimeError(f"espeak-ng did not start: sample rate {rate}, expected {ESPEAK_RATE}")
        self._chunks: list[bytes] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)  # kept: the library holds only a pointer to it
        self._api.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: object) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def close(self) -> None:
        """Remove the link to the data."""
        self._folder.cleanup()

    def choose(self, voice: Voice) -> None:
        """Become a speaker."""
        variant = Path(self._folder.name, "espeak-ng-data", "voices", "!v", voice.espeak.partition("+")[2])
        # a variant it does not know it would leave out without a word
        if not variant.is_file() or self._api.espeak_SetVoiceByName(voice.espeak.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice.espeak!r}")
        self._api.espeak_SetParameter(_PITCH, voice.pitch, 0)

    def speak(self, text: str, rate: int, seed: int) -> bytes:
        """Return int16 samples at `ESPEAK_RATE`."""
        self._chunks.clear()
        self._api.espeak_SetParameter(_RATE, rate, 0)
        self._api.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        data = text.encode() + b"\0"
        failed = self._api.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)
        if failed or self._api.espeak_Synchronize() or not self._chunks:
            raise RuntimeError(f"espeak-ng could not speak {text!r}")
        return b"".join(self._chunks)


def finish(data: bytes) -> np.ndarray:
    """Resample to `SAMPLE_RATE`, trim the silence at both ends to a margin, bring the peak to -3 dB."""
    import numpy as np  # here, because a process without numpy forks three times as fast

    samples = np.frombuffer(data, dtype="<i2").astype(np.float64)
    up, down = 320, 441  # 16000 / 22050
    blocks = -(-len(samples) // down)
    spectrum = np.fft.rfft(samples, blocks * down)[: blocks * up // 2 + 1]
    signal = np.fft.irfft(spectrum, blocks * up) * (up / down)
    peak = float(np.abs(signal).max())
    loud = np.flatnonzero(np.abs(signal) > peak * _SILENCE)
    margin = int(_MARGIN * SAMPLE_RATE)
    padded = np.pad(signal[loud[0] : loud[-1] + 1], margin) if len(loud) else np.zeros(2 * margin)
    return np.round(padded * (0.7 * 32767 / max(peak, 1.0))).astype("<i2")


def _in_fork(work: Callable[[], None]) -> int:
    """Start some work in a copy of this process; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def _join(child: int) -> None:
    """Wait for a copy and fail if it failed."""
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"a speaking process ended with status {os.waitstatus_to_exitcode(status)}")


def _speak_jobs(jobs: Sequence[Job], reader: int, pipe: int) -> None:
    """Send the samples of all jobs through a pipe: a fork a voice, and in it a fork an utterance."""
    os.close(reader)  # else the pipe would stay open, and a write wait for ever, after the reading process has gone
    library = Library()

    def utter(job: Job) -> None:
        samples = library.speak(job.text, round(voice_settings(job.voice).rate * job.rate_scale), job.seed)
        message = memoryview(struct.pack("<I", len(samples)) + samples)
        while message:
            message = message[os.write(pipe, message) :]

    def be(own: Sequence[Job]) -> None:
        library.choose(voice_settings(own[0].voice))
        for job in own:
            _join(_in_fork(partial(utter, job)))

    try:
        for _, own in groupby(jobs, key=lambda job: job.voice):
            _join(_in_fork(partial(be, list(own))))
    finally:
        library.close()


def _abandoned() -> bool:
    """Say whether the process that asked has gone: its end of our stdin is closed."""
    return bool(select.select([0], [], [], 0)[0]) and not os.read(0, 1)


def _write(job: Job, samples: np.ndarray) -> float:
    """Let a recording appear whole; return its length in seconds."""
    temporary = f"{job.path}.part"
    with wave.open(temporary, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    os.replace(temporary, job.path)  # noqa: PTH105 - both are strings
    return len(samples) / SAMPLE_RATE


def main(todo: str) -> None:
    """Record the jobs of a file, those of a voice standing together; print the seconds of each as JSON."""
    jobs = [Job(**fields) for fields in json.loads(Path(todo).read_text(encoding="utf-8"))]
    jobs.sort(key=lambda job: job.voice)
    reader, writer = os.pipe()
    speaker = _in_fork(partial(_speak_jobs, jobs, reader, writer))
    os.close(writer)
    seconds: dict[str, float] = {}
    with os.fdopen(reader, "rb") as pipe:
        for job in jobs:
            header = pipe.read(4)
            if len(header) < 4 or _abandoned():
                break
            seconds[job.path] = _write(job, finish(pipe.read(*struct.unpack("<I", header))))
    _join(speaker)
    if len(seconds) < len(jobs):
        raise RuntimeError("the process that asked has ended")
    json.dump(seconds, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
