"""The pictures and sounds of samples: drawn and written in the few forms that a page can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from omni.audio import resample, standard_level

_WIDTH = 5.5  # inches; letters of 8 points are then readable on a phone
_LEAST_PIXELS = 192  # of the shorter side of a small picture, enlarged without smoothing
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)


def new_figure(height: float) -> Figure:
    """An empty figure of the width that all have, ``height`` in inches."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a JPEG of a few tens of kilobytes."""
    figure.savefig(path, dpi=120, pil_kwargs={"quality": 82})
    return path


def draw_spectrogram(axis: Any, frames_FM: torch.Tensor, frame_rate: float, title: str) -> None:
    """Normalized log-mel frames over seconds."""
    num_frames, num_mels = frames_FM.shape
    axis.imshow(
        frames_FM.numpy().T, origin="lower", aspect="auto", vmin=-2.5, vmax=1.2,
        extent=(0, num_frames / frame_rate, 0, num_mels),
    )  # fmt: skip
    label(axis, title, "mel")


def label(axis: Any, title: str, y: str = "", x: str = "") -> None:
    """Small letters on the axes; a title is shown as it is written."""
    axis.set_title(title.replace("$", r"\$"), fontsize=8, loc="left", wrap=True)
    axis.set_ylabel(y, fontsize=8)
    axis.set_xlabel(x, fontsize=8)
    axis.tick_params(labelsize=7)


def save_sound(wave_S: torch.Tensor, rate: int, path: Path) -> Path:
    """Write samples at the standard level as Ogg Opus: about 10 kB for three seconds.

    Some recordings in Ogg Vorbis, as libsndfile writes them, are refused by Chromium 150 ("PTS is not defined").
    """
    if rate not in _OPUS_RATES:
        wave_S, rate = resample(wave_S.cpu(), rate, _OPUS_RATES[-1]), _OPUS_RATES[-1]
    soundfile.write(path, standard_level(wave_S.detach().float().cpu()).numpy(), rate, format="OGG", subtype="OPUS")
    return path


def save_pixels(pixels_3HW: np.ndarray, path: Path) -> Path:
    """Write a picture as the model sees it, enlarged to be seen by people."""
    image = Image.fromarray(np.ascontiguousarray(pixels_3HW.transpose(1, 2, 0)))
    factor = max(1, -(-_LEAST_PIXELS // min(image.size)))
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(path)
    return path
