"""Stage D of five: speech output, trained from random weights: codec, speaker encoders, vocoder, Talker.

Why: the codec gives speech an alphabet, the Talker writes in it what the Thinker says in the voice that a speaker
encoder describes, the vocoder makes it sound (Griffin-Lim, or a trained one: ``model.vocoder_kind``).

    python train_talker.py --config configs/talker_nano.json

In: a CSV with the columns wav,text[,speaker] (``data.train``; ``data.val``, or a share of it, ``data.val_split``),
stage B's ``audio_enc.pt`` (``audio_ckpt``: it says when each word is spoken, helps to teach the codec, and grades)
and, where the Talker shall get the Thinker's states (``use_thinker_states``), stage A's ``thinker.pt``
(``thinker_ckpt``).
Out: ``talker.pt`` in ``save_dir``.
Evaluated by: the character error rate of generated sentences beside their recordings' (``omni eval --stage talker``),
reconstruction and use of the codes (``omni eval --stage codec``).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from omni import ranks
from omni.checkpoint import as_bytes, fingerprint, load_input, load_weights
from omni.config import PhaseConfig, Problem, RowsDataConfig, StageConfig, from_dict, to_dict
from omni.data.parts import read_parts
from omni.data.speech import scan_speech_manifest
from omni.data.stream import BatchStream, ordered_batches
from omni.data.voices import CropBatch, Crops, PairBatch, Pairs, Voices, WaveBatch, WaveCrops
from omni.evaluate.speech_validation import validate_codec, validate_speaker, validate_vocoder
from omni.generate_speech import Mind
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from omni.models.speaker import speaker_loss_sum
from omni.models.speech import SpeechConfig, SpeechModel, filled_in
from omni.models.thinker import Thinker, ThinkerConfig
from omni.models.vocoder import spectral_loss_sum
from omni.runtime import Precision, log
from omni.talker_stage import talker_stage
from omni.tokenizer import Tokenizer
from omni.training_utils import Run, Stage, run_stage


@dataclass(frozen=True, kw_only=True)
class VoiceData(RowsDataConfig):
    """Where the recordings are, and how they are cut."""

    test: str | None = None  # seen voices, unseen sentences; for `omni eval`
    test_words: str | None = None  # sentences with words never heard in training
    test_shuffled: str | None = None  # sentences whose words stand in any order
    test_voices: str | None = None  # unseen voices
    codec_frames: int = 96  # of a crop, at 100 a second
    vocoder_frames: int = 48
    speaker_frames: int = 120


@dataclass(frozen=True, kw_only=True)
class SpeechStageConfig(StageConfig):
    """Configuration of stage D."""

    data: VoiceData
    audio_ckpt: str
    thinker_ckpt: str | None = None
    use_thinker_states: bool = False  # they made nano's speech worse (docs/log.md)
    val_sentences: int = 16  # generated and graded at each validation of the Talker
    heard_weight: float = 0.3  # in the codec's loss: of what stage B hears in decoded frames; 0: it is not asked
    model: SpeechConfig = field(default_factory=SpeechConfig)
    codec: PhaseConfig
    speaker: PhaseConfig
    vocoder: PhaseConfig | None = None  # where model.vocoder_kind is "istft"; Griffin-Lim needs no training
    talker: PhaseConfig

    def problems(self) -> Iterator[Problem]:
        """Crops that cannot be coded, a vocoder never trained, a phase that trains none, a weight below zero."""
        if self.heard_weight < 0:
            yield Problem("heard_weight", str(self.heard_weight), "0 or more")
        if (self.vocoder is None) == (self.model.vocoder_kind == "istft"):
            expected = "a phase that trains it" if self.vocoder is None else "none"
            why = f"{expected}, since model.vocoder_kind is {self.model.vocoder_kind}"
            yield Problem("vocoder", "none" if self.vocoder is None else "a phase", why)
        for key in ("codec_frames", "vocoder_frames"):
            if getattr(self.data, key) % self.model.codec.reduction:
                expected = f"a multiple of model.codec.reduction ({self.model.codec.reduction})"
                yield Problem(f"data.{key}", str(getattr(self.data, key)), expected)


def codec_loss(model: SpeechModel, batch: CropBatch, encoder: AudioEncoder | None = None) -> dict[str, torch.Tensor]:
    """L1 between true and decoded log-mel frames and of what is heard in them; vectors' distance to their codes.

    A few weak frames decide between "blue" and "plue", and weigh next to nothing in an L1 over all frames. The states
    of a recognizer know what matters (feature matching, Larsen et al., 2016): what stage B makes of the decoded crop is
    compared with what it makes of the true one, relative to the size of the true states.

    Args:
        model: of which the codec is trained.
        batch: crops.
        encoder: stage B's, frozen; None: the frames alone count.
    """
    frames_BFM = batch.frames_BFM
    output = model.codec(frames_BFM)
    decoded_BFM = output.frames_BFM.float()
    mel = (decoded_BFM - frames_BFM).abs().mean(-1).sum()
    losses = {"mel": mel, "commitment": output.commitment_sum * model.config.codec.reduction}
    if encoder is not None:
        num_frames = frames_BFM.shape[1]
        num_frames_B = torch.full((len(frames_BFM),), num_frames, device=frames_BFM.device)
        with torch.no_grad():
            true_BTD = encoder(frames_BFM, num_frames_B).states_BTD.float()
        decoded_BTD = encoder(decoded_BFM, num_frames_B).states_BTD.float()
        share_BT = (decoded_BTD - true_BTD).abs().mean(-1) / true_BTD.abs().mean(-1)
        losses["heard"] = share_BT.sum() * num_frames / share_BT.shape[1]
    return losses


def speaker_loss(model: SpeechModel, batch: PairBatch) -> dict[str, torch.Tensor]:
    """Contrastive losses of the speaker encoder that conditions the Talker and of the one that grades it."""
    speakers, grader = (
        speaker_loss_sum(encoder, encoder(batch.first_BFM), encoder(batch.second_BFM), batch.speaker_B)
        for encoder in (model.speaker, model.grader)
    )
    return {"speakers": speakers, "grader": grader}


def vocoder_loss(model: SpeechModel, batch: WaveBatch) -> dict[str, torch.Tensor]:
    """Spectral loss of the waveform, half of the frames decoded from codes."""
    assert model.vocoder is not None, "SpeechStageConfig.problems has seen to it"
    half = ranks.rows_before(batch.counts["spectrum"] // 2, len(batch.frames_BFM))
    with torch.no_grad():
        decoded = model.codec(batch.frames_BFM[:half]).frames_BFM.float()
    wave_BS = model.vocoder(torch.cat([decoded, batch.frames_BFM[half:]]))
    return {"spectrum": spectral_loss_sum(wave_BS, batch.wave_BS)}


def load_encoder(config: SpeechStageConfig, precision: Precision) -> AudioEncoder:
    """Stage B's encoder, frozen."""
    tensors, summary = load_input(config.audio_ckpt, "audio_enc", "python train_audio_enc.py --config ...")
    encoder = AudioEncoder(from_dict(AudioEncoderConfig, summary["model_config"], config.audio_ckpt))
    load_weights(encoder, tensors["weights"], config.audio_ckpt)
    return encoder.requires_grad_(False).eval().to(precision.device)


def load_mind(config: SpeechStageConfig, precision: Precision) -> Mind | None:
    """Stage A's Thinker, frozen, and its tokenizer; None where the Talker shall do without."""
    if config.thinker_ckpt is None or not config.use_thinker_states:
        return None
    tensors, summary = load_input(config.thinker_ckpt, "thinker", "python train_text.py --config ...")
    thinker = Thinker(from_dict(ThinkerConfig, summary["model_config"], config.thinker_ckpt))
    load_weights(thinker, tensors["weights"], config.thinker_ckpt)
    tokenizer = Tokenizer(as_bytes(tensors["assets"]["tokenizer.model"]))
    return thinker.requires_grad_(False).eval().to(precision.device), tokenizer


def lineage_of(config: SpeechStageConfig, mind: Mind | None) -> dict[str, str | None]:
    """Checksums of the checkpoints that it is built on, and of the tokenizer."""
    return {
        "audio_enc": fingerprint(Path(config.audio_ckpt)),
        "thinker": fingerprint(Path(config.thinker_ckpt)) if mind and config.thinker_ckpt else None,
        "tokenizer": mind[1].hash if mind else None,
    }


def build(config: SpeechStageConfig, precision: Precision) -> Run:
    """One module with its parts, and a phase for each of them that is trained."""
    parts = read_parts(scan_speech_manifest, "wav", "text", config.data)
    encoder, mind = load_encoder(config, precision), load_mind(config, precision)
    training, validation = (Voices(part, config.model.mel, config.data) for part in (parts.training, parts.validation))
    model_config = filled_in(config.model, training.names, mind[0].config if mind else None)
    model, run, data = SpeechModel(model_config), config.run, config.data
    left_out = parts.left_out + training.recordings.left_out

    def on_crops(
        trains: Sequence[nn.Module], kind: type[Crops | Pairs | WaveCrops], num_frames: int,
        loss: Callable[..., dict[str, torch.Tensor]], validate: Callable[..., dict[str, float]],
        phase: PhaseConfig, weights: dict[str, float],
    ) -> Stage:  # fmt: skip
        samples, held_out = (kind(part, num_frames) for part in (training, validation))
        stream = BatchStream(
            samples, phase.batch_size, run.seed, None, run.num_workers, rules=config.data, left_out=left_out
        )

        def evaluate(model: SpeechModel) -> dict[str, float]:
            batches = ordered_batches(held_out, 16, run.val_batches, rules=config.data)
            return validate(model, (batch.to(precision.device) for batch in batches))

        return Stage([*trains], stream, loss, evaluate, phase, weights, "frames")

    def codec() -> Stage:
        weights, quantizer = {"mel": 1.0, "commitment": 0.25}, model.codec.quantizer
        loss = codec_loss
        if config.heard_weight and encoder.config.mel == model_config.mel:
            weights["heard"], loss = config.heard_weight, functools.partial(codec_loss, encoder=encoder)
        elif config.heard_weight:
            log.info("heard_weight is not used: stage B reads other log-mel frames than model.mel describes")
        stage = on_crops([model.codec], Crops, data.codec_frames, loss, validate_codec, config.codec, weights)
        return dataclasses.replace(stage, after_update=quantizer.update, after_skip=quantizer.discard)

    def speaker() -> Stage:
        weights, trains = {"speakers": 1.0, "grader": 1.0}, [model.speaker, model.grader]
        return on_crops(trains, Pairs, data.speaker_frames, speaker_loss, validate_speaker, config.speaker, weights)

    def vocoder(phase: PhaseConfig) -> Stage:
        assert model.vocoder is not None, "SpeechStageConfig.problems has seen to it"
        weights, trains = {"spectrum": 1.0}, [model.vocoder]
        return on_crops(trains, WaveCrops, data.vocoder_frames, vocoder_loss, validate_vocoder, phase, weights)

    def talker() -> Stage:
        return talker_stage(
            model, encoder, mind, (training, validation), config.talker, run, [config.save_dir / "cache"],
            config.val_sentences, parts.left_out,
        )  # fmt: skip

    phases: list[tuple[str, Callable[[], Stage]]] = [("codec", codec), ("speaker", speaker), ("talker", talker)]
    if config.vocoder is not None:
        phases.insert(2, ("vocoder", functools.partial(vocoder, config.vocoder)))
    return Run(
        kind="talker",
        model=model,
        phases=phases,
        model_config=to_dict(model_config),
        data_may_change=config.data.on_bad_sample == "skip",
        lineage={"data": parts.fingerprint, **lineage_of(config, mind)},
    )


if __name__ == "__main__":
    sys.exit(run_stage(SpeechStageConfig, build))
