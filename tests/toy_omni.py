"""A tiny omni model from random weights that says different things to different prompts; what to show it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

from omni.checkpoint import as_tensor, save_checkpoint
from omni.config import to_dict
from omni.data.dialogue import Encoded
from omni.models.omni import OmniConfig, OmniModel
from omni.models.projector import ProjectorConfig, match_rms
from omni.models.thinker import Thinker, ThinkerConfig
from omni.tokenizer import AUDIO, IMAGE, SPECIALS, Tokenizer
from tests.small_shapes import AUDIO_SHAPE, speech_shape, vision_shape

TEXT = [
    "what is the color of the circle ? it is red .\n",
    "how many squares are there ? there are three .\n",
    "the small triangle is above the large blue star .\n",
    "who has the green ball ? ben has the ball .\n",
    "two and two make four , seven and one make eight .\n",
] * 4


def build(vocoder_kind: str = "istft", ctx_len: int = 128) -> tuple[OmniModel, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer; the same each time."""
    tokenizer = Tokenizer.train(TEXT, 360)
    torch.manual_seed(3)
    size = tokenizer.vocab_size
    config = OmniConfig(
        ThinkerConfig(ctx_len, vocab_size=size, dim=32, num_layers=3, num_heads=2, num_kv_heads=1, hidden_dim=64),
        AUDIO_SHAPE,
        vision_shape(size),
        speech_shape(vocoder_kind=vocoder_kind, voices=("ann", "bob")),
        ProjectorConfig(stack=4, hidden_dim=24),
        ProjectorConfig(kind="linear", stack=4, hidden_dim=24),
    )
    model = OmniModel(config, tokenizer.special[IMAGE], tokenizer.special[AUDIO]).eval()
    with torch.no_grad():
        for name, weight in model.thinker.layers.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(std=0.4)  # layers say nothing at first, and the answer would be the last token again
        model.thinker.embed_tokens.weight[[tokenizer.special[mark] for mark in SPECIALS]] *= 0.2  # rarely the answer
        model.speech.voices_NE.normal_()
    for projector in (model.image_projector, model.audio_projector):
        match_rms(projector, model.thinker.embed_tokens.weight)
    return model, tokenizer


def save(path: Path, vocoder_kind: str = "istft") -> Path:
    """The same as a checkpoint."""
    model, tokenizer = build(vocoder_kind)
    tensors = {
        "weights": model.state_dict(),
        "assets": {"tokenizer.model": as_tensor(tokenizer.model)},
    }
    save_checkpoint(path, tensors, {"kind": "omni", "model_config": to_dict(model.config), "config": {"name": "toy"}})
    return path


def save_draft(path: Path, tokenizer: Tokenizer, ctx_len: int = 128) -> Path:
    """A smaller Thinker for it, or for another tokenizer."""
    torch.manual_seed(4)
    shape = ThinkerConfig(
        ctx_len, tokenizer.vocab_size, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=16
    )
    tensors = {"weights": Thinker(shape).state_dict(), "assets": {"tokenizer.model": as_tensor(tokenizer.model)}}
    save_checkpoint(path, tensors, {"kind": "thinker", "model_config": to_dict(shape), "config": {"name": "draft"}})
    return path


class Noise:
    """Features of pictures and recordings by name, from random numbers of the name's own."""

    def __init__(self, num_patches: int, num_states: int = 24, dim: int = 16) -> None:
        self.num_patches, self.num_states, self.dim = num_patches, num_states, dim

    def image(self, path: str) -> torch.Tensor:
        """Patch tokens [P, D]."""
        return self._noise(path, self.num_patches)

    def audio(self, path: str) -> torch.Tensor:
        """Audio encoder states [T, D]."""
        return self._noise(path, self.num_states)

    def _noise(self, path: str, size: int) -> torch.Tensor:
        seed = int.from_bytes(path.encode(), "big") % 2**31
        return torch.randn(size, self.dim, generator=torch.Generator().manual_seed(seed))


Toy = tuple[OmniModel, Tokenizer, list[Encoded], Noise]


def with_prompts() -> Toy:
    """The model, its tokenizer, prompts, and the features of what they show."""
    model, tokenizer = build()
    return model, tokenizer, prompts(model, tokenizer), Noise(model.config.vision_encoder.num_patches)


def prompts(model: OmniModel, tokenizer: Tokenizer) -> list[Encoded]:
    """Five prompts of unequal lengths: text, a picture, a recording, both, and two pictures about a recording."""
    start, end, begin = (tokenizer.special[mark] for mark in ("<|user|>", "<|end|>", "<|assistant|>"))
    image = [tokenizer.special[IMAGE]] * model.image_positions

    def prompt(*parts: str) -> Encoded:
        made = Encoded([start], [])
        for part in parts:
            kind, _, name = part.partition(":")
            if kind == "image":
                made.tokens += image
                made.images.append(name)
            elif kind == "audio":
                size = 3 + len(name)
                made.tokens += [tokenizer.special[AUDIO]] * size
                made.audios.append(name)
                made.audio_positions.append(size)
                made.num_words.append(0)
            else:
                made.tokens += tokenizer.encode(f" {part}")
        made.tokens += [end, begin]
        made.labels = [-100] * len(made.tokens)
        return made

    return [
        prompt("how many squares are there ?"),
        prompt("image:a", "what is the color of the circle ?"),
        prompt("audio:bc"),
        prompt("image:d", "audio:e", "who ?"),
        prompt("image:f", "image:g", "what is above the star ?", "audio:hi"),
    ]


def picture(color: tuple[int, ...] = (200, 30, 30), mode: str = "RGB", kind: str = "PNG", size: int = 40) -> bytes:
    """A circle's bounding box, filled, in a picture file."""
    image = Image.new(mode, (size, size), tuple(255 - c for c in color) if mode == "RGB" else 0)
    image.paste(color, (8, 8, size // 2, size // 2))
    writer = io.BytesIO()
    image.save(writer, kind)
    return writer.getvalue()


def sound(seconds: float = 0.6, pitch: float = 300, kind: str = "WAV", rate: int = 16000) -> bytes:
    """A tone that grows, in a sound file."""
    time = np.arange(int(rate * seconds)) / rate
    wave = 16000 * time / max(seconds, 1e-9) * np.sin(2 * np.pi * pitch * time)
    writer = io.BytesIO()
    soundfile.write(writer, wave.round().astype(np.int16), rate, format=kind)  # of floats, containers round differently
    return writer.getvalue()
