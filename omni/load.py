"""Models rebuilt from checkpoints alone: shapes, weights and tokenizer all come from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from omni.checkpoint import as_bytes, load_input, load_weights
from omni.config import UserError, from_dict
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from omni.models.omni import OmniConfig, OmniModel
from omni.models.speech import SpeechConfig, SpeechModel
from omni.models.thinker import Thinker, ThinkerConfig
from omni.models.vision_encoder import VisionConfig, VisionEncoder
from omni.stages import stage_of
from omni.tokenizer import AUDIO, IMAGE, Tokenizer

Module = TypeVar("Module", bound=nn.Module)


def load_thinker(path: str | Path) -> tuple[Thinker, Tokenizer]:
    """The Thinker of a ``thinker.pt`` and its tokenizer.

    Raises:
        UserError: like every function here, when the file is missing (naming the command that makes it), damaged, or
            another stage's.
    """
    tensors, summary = _load(path, "thinker")
    thinker = Thinker(from_dict(ThinkerConfig, summary["model_config"], str(path)))
    return _filled(thinker, tensors, path), _tokenizer(tensors)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a ``thinker.pt`` alone."""
    return _tokenizer(_load(path, "thinker")[0])


def load_draft(path: str | Path, larger: Thinker, tokenizer: Tokenizer) -> Thinker:
    """The Thinker of a ``thinker.pt`` that shall guess ahead for a larger one, on the same device.

    Raises:
        UserError: also when it was trained with another tokenizer, or for shorter texts.
    """
    draft, own = load_thinker(path)
    if own.hash != tokenizer.hash:
        raise UserError(
            f"{path}: found a Thinker with tokenizer {own.hash}, expected {tokenizer.hash} as in the model that it is "
            "to guess for; train it with `--thinker_ckpt` of that model's Thinker"
        )
    if draft.config.ctx_len < larger.config.ctx_len:
        raise UserError(
            f"{path}: found a Thinker with ctx_len {draft.config.ctx_len}, expected at least {larger.config.ctx_len} "
            "as in the model that it is to guess for"
        )
    return draft.to(larger.embed_tokens.weight.device)


def load_audio_encoder(path: str | Path) -> AudioEncoder:
    """The audio encoder of an ``audio_enc.pt``."""
    tensors, summary = _load(path, "audio_enc")
    return _filled(AudioEncoder(from_dict(AudioEncoderConfig, summary["model_config"], str(path))), tensors, path)


def load_vision(path: str | Path) -> VisionEncoder:
    """The vision encoder and text tower of a ``vision.pt``."""
    return load_vision_and_tokenizer(path)[0]


def load_vision_and_tokenizer(path: str | Path) -> tuple[VisionEncoder, Tokenizer]:
    """The same with the tokenizer of its text tower."""
    tensors, summary = _load(path, "vision")
    encoder = VisionEncoder(from_dict(VisionConfig, summary["model_config"], str(path)))
    return _filled(encoder, tensors, path), _tokenizer(tensors)


def load_speech(path: str | Path) -> SpeechModel:
    """Codec, vocoder, speaker encoder and Talker of a ``talker.pt``."""
    tensors, summary = _load(path, "talker")
    return _filled(SpeechModel(from_dict(SpeechConfig, summary["model_config"], str(path))), tensors, path)


def load_omni(path: str | Path) -> tuple[OmniModel, Tokenizer]:
    """The whole model of an ``omni.pt`` and its tokenizer."""
    tensors, summary = _load(path, "omni")
    tokenizer = _tokenizer(tensors)
    config = from_dict(OmniConfig, summary["model_config"], str(path))
    model = OmniModel(config, tokenizer.special[IMAGE], tokenizer.special[AUDIO])
    return _filled(model, tensors, path), tokenizer


def _load(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    stage = stage_of(kind)
    return load_input(path, kind, f"python {stage.script} --config configs/{stage.prefix}_nano.json")


def _filled(module: Module, tensors: dict[str, Any], path: str | Path) -> Module:
    load_weights(module, tensors["weights"], str(path))
    return module.eval()


def _tokenizer(tensors: dict[str, Any]) -> Tokenizer:
    return Tokenizer(as_bytes(tensors["assets"]["tokenizer.model"]))
