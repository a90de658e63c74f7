"""The omni model: where pictures and recordings enter the Thinker's sequence. The one fusion point.

A prompt is a row of tokens with placeholders. The encoders' features, projected, replace the embeddings at the
placeholders, in order; from there on the Thinker reads one sequence and knows no modality.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from omni.models.layers import padding_mask
from omni.models.lora import LoRAConfig, add_adapters
from omni.models.projector import (
    ProjectorConfig,
    build_projector,
    num_stacked,
    stack_patches,
    stack_states,
)
from omni.models.speech import SpeechConfig, SpeechModel
from omni.models.thinker import Thinker, ThinkerConfig
from omni.models.vision_encoder import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class OmniConfig:
    """Shapes of all parts; each is that of the checkpoint the part came from."""

    thinker: ThinkerConfig
    audio_encoder: AudioEncoderConfig
    vision_encoder: VisionConfig
    speech: SpeechConfig
    image_projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    audio_projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    with_words: bool = False  # behind a recording's projected states stand the words heard in it (omni/hearing.py)
    lora: LoRAConfig | None = None  # of the Thinker, where they are not merged into its weights


class OmniModel(nn.Module):
    """Thinker, audio encoder, vision encoder, their projectors, and the speech model (codec, vocoder, Talker)."""

    def __init__(self, config: OmniConfig, image_id: int, audio_id: int) -> None:
        super().__init__()
        self.config, self.image_id, self.audio_id = config, image_id, audio_id
        self.thinker = Thinker(config.thinker)
        if config.lora is not None:
            add_adapters(self.thinker, config.lora)
        self.audio_encoder = AudioEncoder(config.audio_encoder)
        self.vision_encoder = VisionEncoder(config.vision_encoder)
        self.speech = SpeechModel(config.speech)
        dim = config.thinker.dim
        self.image_projector = build_projector(config.vision_encoder.dim, dim, config.image_projector)
        self.audio_projector = build_projector(config.audio_encoder.dim, dim, config.audio_projector)

    @property
    def image_positions(self) -> int:
        """Positions that a picture takes."""
        return num_stacked(self.config.vision_encoder.num_patches, self.config.image_projector.stack)

    def audio_positions(self, num_states: int) -> int:
        """Positions that a recording of ``num_states`` encoder states takes."""
        return -(-num_states // self.config.audio_projector.stack)

    def project_images(self, patches_NPD: torch.Tensor) -> torch.Tensor:
        """Patch tokens to embeddings [N, image_positions, D]."""
        return self.image_projector(stack_patches(patches_NPD, self.config.image_projector.stack))

    def project_audio(self, states_NTD: torch.Tensor) -> torch.Tensor:
        """Audio encoder states, padded with zeros, to embeddings [N, ceil(T / stack), D]."""
        config = self.config.audio_projector
        return self.audio_projector(stack_states(states_NTD, config.stack, config.context))

    def embed(
        self,
        tokens_BT: torch.Tensor,
        patches_NPD: torch.Tensor,
        states_NTD: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> torch.Tensor:
        """Embeddings [B, T, D] of a batch of prompts.

        Args:
            tokens_BT: tokens with ``image_positions`` placeholders a picture and ``positions_N`` a recording.
            patches_NPD: features of all pictures, in the order of their placeholders, row by row.
            states_NTD: audio encoder states of all recordings, likewise, padded with zeros.
            positions_N: positions that each recording's states take; what is beyond was cut.
        """
        x = self.thinker.embed(tokens_BT)
        if len(patches_NPD):
            x = replace_at(x, tokens_BT == self.image_id, self.project_images(patches_NPD).flatten(0, 1))
        if len(states_NTD):
            heard_NSD = self.project_audio(states_NTD)
            x = replace_at(x, tokens_BT == self.audio_id, heard_NSD[padding_mask(positions_N, heard_NSD.shape[1])])
        return x


def replace_at(x_BTD: torch.Tensor, where_BT: torch.Tensor, rows_ND: torch.Tensor) -> torch.Tensor:
    """Put ``rows_ND`` at the True positions, in order. Raises ValueError when the numbers differ."""
    if int(where_BT.sum()) != rows_ND.shape[0]:
        raise ValueError(f"found {int(where_BT.sum())} placeholders for {rows_ND.shape[0]} features")
    return x_BTD.masked_scatter(where_BT[..., None], rows_ND.to(x_BTD.dtype))
