"""`omni speak`: a text as a WAV file, in a voice of the training data or in that of a recording."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from omni.audio import load_audio, log_mel, save_wav
from omni.config import RunConfig, UserError
from omni.generate_speech import Mind, Spoken, embed_speakers, speak
from omni.load import load_omni, load_speech, load_thinker
from omni.models.speech import SpeechModel
from omni.runtime import setup_compute
from omni.sampling import GREEDY, Sampling
from omni.summary import read_summary


@dataclass(frozen=True)
class Request:
    """What shall be said, and how.

    Attributes:
        text: any text; digits and symbols are read as words, long texts in chunks.
        voice: a speaker of the training data; None: the first.
        reference: a recording whose voice is meant, instead of ``voice``; a few seconds are enough.
        sampling: how codes are drawn.
        speed: 2.0 halves every duration.
    """

    text: str
    voice: str | None = None
    reference: Path | None = None
    sampling: Sampling = GREEDY
    speed: float = 1.0


def load_speaker(checkpoint: Path) -> tuple[SpeechModel, Mind | None]:
    """What speaks: of a ``talker.pt`` with the Thinker that it was trained on, of an ``omni.pt`` with its own.

    Raises:
        UserError: when it is neither, or its Thinker is missing.
    """
    summary = read_summary(checkpoint)
    if summary["kind"] == "omni":
        omni, tokenizer = load_omni(checkpoint)
        return omni.speech, (omni.thinker, tokenizer) if omni.speech.config.talker.state_dim else None
    if summary["kind"] != "talker":
        raise UserError(f"{checkpoint}: found a checkpoint of {summary['kind']}, expected talker.pt or omni.pt")
    speech = load_speech(checkpoint)
    return speech, load_thinker(summary["config"]["thinker_ckpt"]) if speech.config.talker.state_dim else None


def say(speech: SpeechModel, mind: Mind | None, request: Request) -> Spoken:
    """Speak a text.

    Raises:
        UserError: for an unknown voice (the message lists those that there are), a reference that is no recording, or
            a text with nothing to speak.
    """
    return speak(speech, [request.text], _voice(speech, request)[None], mind, request.sampling, request.speed)[0]


def say_to_file(checkpoint: Path, request: Request, out: Path) -> str:
    """Speak a text into a WAV file; returns a line about it.

    Raises:
        UserError: see :func:`load_speaker` and :func:`say`; and when ``out`` cannot be written.
    """
    if out.suffix.lower() != ".wav":
        raise UserError(f"--out: found {out}, expected the name of a .wav file")
    if not out.parent.is_dir():
        raise UserError(f"--out: {out.parent}: no such folder, expected an existing one")
    setup_compute(RunConfig(device="cpu"))
    speech, mind = load_speaker(checkpoint)
    started = time.perf_counter()
    spoken = say(speech, mind, request)
    elapsed, rate = time.perf_counter() - started, speech.config.mel.sample_rate
    try:
        save_wav(out, spoken.wave, rate)
    except (RuntimeError, OSError) as error:
        raise UserError(f"--out: {out}: cannot be written ({error})") from None
    seconds = len(spoken.wave) / rate
    voice = request.reference or request.voice or speech.default_voice or "the only one"
    return f"{out}: {seconds:.2f} s, voice {voice}, made in {elapsed:.2f} s ({elapsed / seconds:.2f} of its length)"


def _voice(speech: SpeechModel, request: Request) -> torch.Tensor:
    """The embedding [E] of the voice that is asked for."""
    if request.reference is None:
        return speech.voice(request.voice)
    if request.voice is not None:
        raise UserError("--voice and --reference: found both, expected one of them")
    mel = speech.config.mel
    return embed_speakers(speech, [log_mel(mel)(load_audio(request.reference, mel.sample_rate))])[0]
