"""Stages B and D, to be seen and heard: what is recognized and when; recording, codec and Talker side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from omni.audio import MelConfig, forced_align, load_audio, log_mel, standard_level
from omni.data.speech import Recordings, pad_frames
from omni.data.voices import Voices
from omni.evaluate.audio_enc import hear
from omni.evaluate.codec import resynthesize
from omni.evaluate.sample_media import draw_spectrogram, label, new_figure, save_figure, save_sound
from omni.evaluate.talker import speak_again
from omni.generate_speech import Mind
from omni.metrics import character_error_rate
from omni.models.audio_encoder import AudioEncoder, transcripts
from omni.models.quantizer import code_usage
from omni.models.speech import SpeechModel
from omni.sample import Sample
from omni.tokenizer import Characters

KINDS = ("recording", "vocoder", "codec", "talker")
_MOST_SYMBOLS = 24  # rows of a picture of posteriors


@torch.no_grad()
def show_hearing(encoder: AudioEncoder, recordings: Recordings, out: Path) -> list[Sample]:
    """Each recording with its spectrogram, and under it what CTC reads at which moment."""
    found, device = [], encoder.head.weight.device
    for index, row in enumerate(recordings.rows):
        frames_FM, text = recordings.frames(index), str(row.values["text"])
        frames_1FM, sizes_1 = pad_frames([frames_FM])
        output = encoder(frames_1FM.to(device), sizes_1.to(device))
        heard = transcripts(output)[0]
        log_probs_SV = output.log_probs_BSV[0, : int(output.num_steps_B[0])].float().cpu()
        picture = out / f"hearing_{index + 1}.jpg"
        _draw_posteriors(frames_FM, log_probs_SV, heard, encoder.config.mel, picture)
        wave = load_audio(row.path("wav"), encoder.config.mel.sample_rate)
        sound = save_sound(wave, encoder.config.mel.sample_rate, out / f"hearing_{index + 1}.ogg")
        error = character_error_rate([text], [heard]).value
        found.append(
            Sample(
                "a held-out recording, written down",
                (("said", text), ("character error rate", f"{error:.2f}"), ("heard", heard or "(nothing)")),
                (("spectrogram, and the probability of each character at each moment (CTC)", picture),),
                (("recording", sound),),
                right=error == 0,
            )
        )
    return found


def _draw_posteriors(
    frames_FM: torch.Tensor, log_probs_SV: torch.Tensor, heard: str, mel: MelConfig, path: Path
) -> None:
    """A spectrogram with each character of the transcript at its moment, over the probabilities of the likely ones."""
    symbols, seconds, probabilities_SV = Characters(), len(frames_FM) / mel.frame_rate, log_probs_SV.exp()
    peaks_V = probabilities_SV.max(dim=0).values
    peaks_V[[symbols.blank, symbols.pad]] = 0
    highest = peaks_V.topk(_MOST_SYMBOLS)
    shown = sorted(highest.indices[highest.values > 0.05].tolist())
    rows = [symbols.blank, *shown]
    figure = new_figure(2.2 + 0.13 * len(rows))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 0.6 + 0.13 * len(rows)])
    draw_spectrogram(above, frames_FM, mel.frame_rate, "log-mel spectrogram, and the transcript aligned with it")
    spans = forced_align(log_probs_SV, symbols.encode(heard), symbols.blank) if heard else []
    for (first, end), letter in zip(spans, heard, strict=True):
        second = (first + end) / 2 * seconds / len(log_probs_SV)
        above.text(second, 0.88 * frames_FM.shape[1], _letter(letter), color="white", fontsize=8, ha="center")
    below.imshow(
        probabilities_SV[:, rows].T.numpy(), origin="lower", aspect="auto", vmin=0, vmax=1, cmap="magma",
        extent=(0, seconds, -0.5, len(rows) - 0.5), interpolation="nearest",
    )  # fmt: skip
    names = ["blank", *(_letter(symbols.decode([symbol])) for symbol in shown)]
    below.set_yticks(range(len(rows)), names)
    label(below, "CTC posteriors, black 0 to light 1", x="seconds")
    below.tick_params(axis="y", labelsize=6)
    save_figure(figure, path)


def _letter(character: str) -> str:
    """A character as it can be seen."""
    return character.replace(" ", "\u2423").replace("$", r"\$")


def show_speaking(
    model: SpeechModel, encoder: AudioEncoder, voices: Voices, out: Path, mind: Mind | None = None
) -> list[Sample]:
    """Sentences as recorded, through vocoder and codec, and as the Talker says them; then how the codes are used.

    Args:
        model: a trained ``talker.pt``.
        encoder: the recognizer whose transcripts stand above the spectrograms.
        voices: held-out recordings.
        out: a folder for ``sample_<n>.jpg``, ``sample_<n>_<kind>.ogg`` and ``codes.jpg``.
        mind: Thinker and tokenizer, when the Talker shall get states.
    """
    made, spoken = resynthesize(model, voices), speak_again(model, voices, mind)
    rate, found = model.config.mel.sample_rate, []
    for index in range(len(voices)):
        frames = [item[None].to(model.device) for item in (voices.frames(index), made.frames[index])]
        waves = [
            voices.samples(index),
            *(model.waveforms(frames_1FM)[0].cpu() for frames_1FM in frames),
            spoken[index].wave.cpu(),
        ]
        heard = hear(encoder, waves, rate)
        picture = out / f"sample_{index + 1}.jpg"
        _draw_sounds(model, waves, heard, picture)
        sounds = [save_sound(wave, rate, out / f"sample_{index + 1}_{kind}.ogg")
                  for kind, wave in zip(KINDS, waves, strict=True)]  # fmt: skip
        found.append(
            Sample(
                f"a held-out sentence ({voices.speakers[index]})",
                (("text", voices.text(index)), *((f"{k}, heard as", t) for k, t in zip(KINDS, heard, strict=True))),
                (("recording, vocoder, codec and Talker, and what the recognizer understands of each", picture),),
                tuple(zip(KINDS, sounds, strict=True)),
            )
        )
    return [*found, _show_codes(model, made.codes, out)]


def _draw_sounds(model: SpeechModel, waves: Sequence[torch.Tensor], heard: Sequence[str], path: Path) -> None:
    """The log-mel spectrograms of the waveforms, with what was understood of each."""
    front, mel = log_mel(model.config.mel), model.config.mel
    figure = new_figure(1.35 * len(waves))
    axes = np.atleast_1d(figure.subplots(len(waves), 1, sharex=True))
    for axis, kind, wave, text in zip(axes, KINDS, waves, heard, strict=True):
        short = text if len(text) <= 60 else f"{text[:60]}..."
        draw_spectrogram(axis, front(standard_level(wave)), mel.frame_rate, f"{kind}: \u201c{short}\u201d")
    axes[-1].set_xlabel("seconds", fontsize=8)
    save_figure(figure, path)


def _show_codes(model: SpeechModel, codes: Sequence[torch.Tensor], out: Path) -> Sample:
    """How often each code of each codebook was written."""
    codes_NK, size = torch.cat(list(codes)), model.config.codec.quantizer.codebook_size
    usage, perplexity = code_usage(codes_NK, size)
    figure = new_figure(1.3 * codes_NK.shape[1] + 0.3)
    axes = np.atleast_1d(figure.subplots(codes_NK.shape[1], 1, sharex=True))
    for number, axis in enumerate(axes):
        counts = torch.bincount(codes_NK[:, number], minlength=size).sort(descending=True).values
        axis.bar(range(size), counts.numpy(), width=1.0)
        label(axis, f"codebook {number + 1}: {usage[number]:.0%} of {size} codes used, perplexity "
              f"{perplexity[number]:.1f}", "times")  # fmt: skip
    axes[-1].set_xlabel("codes, the most used first", fontsize=8)
    picture = save_figure(figure, out / "codes.jpg")
    texts = tuple(
        (f"codebook {number}", f"{used:.1%} of {size} codes used, perplexity {spread:.1f}")
        for number, (used, spread) in enumerate(zip(usage, perplexity, strict=True), 1)
    )
    title = f"use of the codes in these {len(codes)} recordings, {len(codes_NK):,} frames"
    return Sample(title, texts, (("how often each code was written", picture),))
