"""All parts of speech output in one module: codec, vocoder, speaker encoder, Talker, and the voices they know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from omni.audio import MelConfig, griffin_lim, griffin_lim_look_ahead
from omni.config import Problem, UserError, from_dict
from omni.models.codec import Codec, CodecConfig
from omni.models.speaker import SpeakerConfig, SpeakerEncoder
from omni.models.talker import Talker, TalkerConfig
from omni.models.thinker import ThinkerConfig
from omni.models.vocoder import Vocoder, VocoderConfig


@dataclass(frozen=True)
class SpeechConfig:
    """Shapes of everything that speaks; :class:`SpeechModel` can be built from it alone."""

    mel: MelConfig = field(default_factory=MelConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    speaker: SpeakerConfig = field(default_factory=SpeakerConfig)
    talker: TalkerConfig = field(default_factory=TalkerConfig)
    vocoder_kind: Literal["griffin_lim", "istft"] = "griffin_lim"  # only "istft" has weights to train
    thinker_layer: int = -1  # whose states the Talker gets; -1: the middle of the Thinker
    voices: tuple[str, ...] = ()  # names of the speakers of the training data; filled in when built

    def problems(self) -> Iterator[Problem]:
        """Parts that do not fit each other."""
        for key, found in (("codec.num_mels", self.codec.num_mels), ("speaker.num_mels", self.speaker.num_mels)):
            if found != self.mel.num_mels:
                yield Problem(key, str(found), f"mel.num_mels ({self.mel.num_mels})")
        most = self.codec.quantizer.num_codebooks
        if not 0 <= self.talker.num_codebooks <= most:
            expected = f"at most codec.quantizer.num_codebooks ({most}); 0: all"
            yield Problem("talker.num_codebooks", str(self.talker.num_codebooks), expected)


class SpeechModel(nn.Module):
    """Codec, vocoder, speaker encoders and Talker.

    Attributes:
        voices_NE: the mean embedding of each training speaker.
        clearest: which of them is understood best, and speaks where none is asked for.
    """

    voices_NE: torch.Tensor
    clearest: torch.Tensor

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.config = config
        self.codec = Codec(config.codec)
        self.vocoder = Vocoder(config.vocoder, config.mel) if config.vocoder_kind == "istft" else None
        self.speaker = SpeakerEncoder(config.speaker)
        # from other random weights: it conditions nothing, and says whether speech sounds like its speaker
        self.grader = SpeakerEncoder(config.speaker)
        quantizer = config.codec.quantizer
        num_codebooks = config.talker.num_codebooks or quantizer.num_codebooks
        self.talker = Talker(config.talker, num_codebooks, quantizer.codebook_size, config.speaker.embedding_dim)
        self.register_buffer("voices_NE", torch.zeros(len(config.voices), config.speaker.embedding_dim))
        self.register_buffer("clearest", torch.zeros((), dtype=torch.long))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.voices_NE.device

    @property
    def code_rate(self) -> float:
        """Code frames a second."""
        return self.config.mel.frame_rate / self.config.codec.reduction

    @property
    def vocoder_look_ahead(self) -> int:
        """Mel frames that a frame's samples depend on beyond it, and as many before it."""
        if self.vocoder is not None:
            return self.vocoder.look_ahead
        return griffin_lim_look_ahead(self.config.mel)

    @property
    def codebooks(self) -> torch.Tensor:
        """The codebooks [K, V, D] that the Talker writes in."""
        return self.codec.quantizer.codebooks_KVD[: self.talker.num_codebooks]

    @property
    def bits_per_second(self) -> float:
        """What the codec's codes carry at most."""
        return self.config.codec.quantizer.bits_per_frame * self.code_rate

    @property
    def default_voice(self) -> str:
        """The name of the clearest voice."""
        return self.config.voices[int(self.clearest)]

    def voice(self, name: str | None) -> torch.Tensor:
        """The embedding [E] of a voice of the training data; of None, the clearest one.

        Raises:
            UserError: listing the voices.
        """
        if name is None:
            return self.voices_NE[self.clearest]
        if name not in self.config.voices:
            raise UserError(f"voice: found {name!r}, expected one of {', '.join(self.config.voices)}")
        return self.voices_NE[self.config.voices.index(name)]

    @torch.no_grad()
    def waveforms(self, frames_BFM: torch.Tensor) -> torch.Tensor:
        """Waveforms [B, F * hop_length] of log-mel frames, by the configured vocoder, in fp32."""
        with torch.autocast(frames_BFM.device.type, enabled=False):
            return self._waveforms(frames_BFM.float())

    def _waveforms(self, frames_BFM: torch.Tensor) -> torch.Tensor:
        if self.vocoder is not None:
            return self.vocoder(frames_BFM).float()
        wave_BS = griffin_lim(frames_BFM.cpu(), self.config.mel).to(frames_BFM.device)
        missing = frames_BFM.shape[1] * self.config.mel.hop_length - wave_BS.shape[1]
        return nn.functional.pad(wave_BS, (0, max(0, missing)))


def speech_from_checkpoint(tensors: dict[str, Any], summary: dict[str, Any], where: str) -> SpeechModel:
    """The model of a loaded ``talker.pt``, ready to speak."""
    model = SpeechModel(from_dict(SpeechConfig, summary["model_config"], where))
    model.load_state_dict(tensors["weights"])
    return model.eval()


def filled_in(config: SpeechConfig, voices: Sequence[str], thinker: ThinkerConfig | None) -> SpeechConfig:
    """The configuration with what depends on the data and on the Thinker.

    Raises:
        UserError: when the Thinker has no such layer.
    """
    talker = dataclasses.replace(config.talker, state_dim=thinker.dim if thinker else 0)
    layer = config.thinker_layer
    if thinker:
        if layer > thinker.num_layers:
            raise UserError(f"model.thinker_layer: found {layer}, expected at most {thinker.num_layers}")
        layer = layer if layer >= 0 else thinker.num_layers // 2
    return dataclasses.replace(config, talker=talker, voices=tuple(voices), thinker_layer=layer)
