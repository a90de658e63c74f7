"""`omni samples`: held-out sentences as recorded, through vocoder and codec, and as the Talker says them.

For each there is a picture with the spectrograms one above the other, and a file to listen to for each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from omni.audio import log_mel, standard_level
from omni.config import DataConfig
from omni.data.manifest import RULES
from omni.data.speech import read_speech_manifest
from omni.data.voices import Voices
from omni.evaluate.audio_enc import hear
from omni.evaluate.codec import resynthesize
from omni.evaluate.talker import speak_again
from omni.generate_speech import Mind
from omni.models.audio_encoder import AudioEncoder
from omni.models.speech import SpeechModel

KINDS = ("recording", "vocoder", "codec", "talker")


def make_samples(
    model: SpeechModel,
    encoder: AudioEncoder,
    manifest: str | Path,
    out: Path,
    mind: Mind | None = None,
    count: int = 3,
    rules: DataConfig = RULES,
) -> list[Path]:
    """Write ``sample_<n>.jpg`` and ``sample_<n>_<kind>.ogg`` for the first sentences of a manifest; returns the files.

    Args:
        model: a trained ``talker.pt``.
        encoder: the recognizer whose transcripts stand above the spectrograms.
        manifest: held-out recordings.
        out: a folder, made if it is not there.
        mind: Thinker and tokenizer, when the Talker shall get states.
        count: sentences.
        rules: the limits of the data.
    """
    voices = Voices(read_speech_manifest(manifest, rules)[:count], model.config.mel, rules)
    coded, spoken = resynthesize(model, voices).frames, speak_again(model, voices, mind)
    rate, written = model.config.mel.sample_rate, []
    out.mkdir(parents=True, exist_ok=True)
    for index in range(len(voices)):
        made = [frames_FM[None].to(model.device) for frames_FM in (voices.frames(index), coded[index])]
        waves = [
            voices.samples(index),
            *(model.waveforms(frames)[0].cpu() for frames in made),
            spoken[index].wave.cpu(),
        ]
        title = f"{voices.text(index)}  ({voices.speakers[index]})"
        written.append(out / f"sample_{index + 1}.jpg")
        _draw(model, title, waves, hear(encoder, waves, rate), written[-1])
        for kind, wave in zip(KINDS, waves, strict=True):
            written.append(out / f"sample_{index + 1}_{kind}.ogg")
            soundfile.write(written[-1], standard_level(wave).numpy(), rate, format="OGG", subtype="VORBIS")
    return written


def _draw(model: SpeechModel, title: str, waves: list[torch.Tensor], heard: list[str], path: Path) -> None:
    """The log-mel spectrograms of the waveforms, with what was understood of each."""
    front, hop = log_mel(model.config.mel), model.config.mel.hop_length / model.config.mel.sample_rate
    figure = Figure(figsize=(9, 1.7 * len(waves)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(len(waves), 1, sharex=True))
    figure.suptitle(title, fontsize=10)
    for axis, kind, wave, text in zip(axes, KINDS, waves, heard, strict=True):
        frames_FM = front(standard_level(wave)).numpy()
        axis.imshow(
            frames_FM.T, origin="lower", aspect="auto", vmin=-2.5, vmax=1.2, extent=(0, len(frames_FM) * hop, 0, 80)
        )
        axis.set_title(f"{kind}: \u201c{text}\u201d", fontsize=8, loc="left")
        axis.set_ylabel("mel", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("seconds", fontsize=8)
    figure.savefig(path, dpi=70, pil_kwargs={"quality": 80})
