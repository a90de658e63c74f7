"""The smallest shapes of every part of the omni model, for tests that need all of them."""

from __future__ import annotations

from typing import Any

from omni.models.audio_encoder import AudioEncoderConfig
from omni.models.codec import CodecConfig
from omni.models.quantizer import QuantizerConfig
from omni.models.speaker import SpeakerConfig
from omni.models.speech import SpeechConfig
from omni.models.talker import TalkerConfig
from omni.models.vision_encoder import VisionConfig
from omni.models.vocoder import VocoderConfig

AUDIO_SHAPE = AudioEncoderConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32, conv_kernel=3)


def vision_shape(vocab_size: int) -> VisionConfig:
    """A vision encoder for pictures of 32 x 32."""
    return VisionConfig(
        image_size=32, dim=16, num_layers=1, num_heads=2, hidden_dim=32, stem_depth=1, vocab_size=vocab_size,
        text_dim=16, text_layers=1, text_heads=2, text_hidden_dim=32, embed_dim=8,
    )  # fmt: skip


def speech_shape(**changed: Any) -> SpeechConfig:
    """Speech output; ``changed`` are fields of its configuration."""
    return SpeechConfig(
        codec=CodecConfig(dim=16, num_layers=1, quantizer=QuantizerConfig(codebook_size=8, dim=4)),
        vocoder=VocoderConfig(dim=16, num_layers=1),
        speaker=SpeakerConfig(dim=8, num_layers=1, embedding_dim=4),
        talker=TalkerConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32),
        **changed,
    )
