"""Stage B of five: the audio encoder, trained from random weights to write down what it hears.

Why: its states are how the Thinker will hear, and its alignments are how the Talker will learn timing.

    python train_audio_enc.py --config configs/audio_enc_nano.json

In: a CSV with the columns wav,text[,speaker] (``data.train``; ``data.val``, or a share of it, ``data.val_split``).
Out: ``audio_enc.pt`` in ``save_dir``.
Evaluated by: word error rate of unseen sentences, in seen and in unseen voices (``omni eval --stage audio_enc``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni.checkpoint import fingerprint
from omni.config import PhaseConfig, Problem, RowsDataConfig, StageConfig, to_dict
from omni.data.parts import read_parts
from omni.data.speech import Augmentation, SpeechBatch, Transcribed, scan_speech_manifest
from omni.data.stream import BatchStream, ordered_batches
from omni.evaluate.audio_enc import Recognition
from omni.load import load_audio_encoder
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig, ctc_loss_sum, transcripts
from omni.runtime import Precision
from omni.training_utils import Run, Stage, run_stage


@dataclass(frozen=True, kw_only=True)
class SpeechData(RowsDataConfig):
    """Where the recordings are."""

    test: str | None = None  # seen voices, unseen sentences; for `omni eval`
    test_voices: str | None = None  # unseen voices
    spec_augment: bool = True
    noise: float = 0.0  # the share of recordings that are heard with noise, and with more silence at the ends
    warp: float = 0.0  # up to this share longer or shorter, higher or lower: for few recordings, or few voices

    def problems(self) -> Iterator[Problem]:
        """Stretches that leave no speech."""
        yield from super().problems()
        if not 0 <= self.warp < 0.5:
            yield Problem("warp", str(self.warp), "a share from 0 to below 0.5")
        if not 0 <= self.noise <= 1:
            yield Problem("noise", str(self.noise), "a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class AudioConfig(StageConfig):
    """Configuration of stage B."""

    data: SpeechData
    model: AudioEncoderConfig
    train: PhaseConfig
    audio_ckpt: str | None = None  # a finished stage B to go on from, in its shape; for recordings that are few


def loss(encoder: AudioEncoder, batch: SpeechBatch) -> dict[str, torch.Tensor]:
    """CTC over characters, summed."""
    output = encoder(batch.frames_BFM, batch.num_frames_B)
    return {"characters": ctc_loss_sum(output, batch.symbols_BS, batch.num_symbols_B)}


def build(config: AudioConfig, precision: Precision) -> Run:
    """The encoder and its one phase."""
    parts = read_parts(scan_speech_manifest, "wav", "text", config.data)
    encoder = AudioEncoder(config.model)
    lineage: dict[str, Any] = {"data": parts.fingerprint}
    if config.audio_ckpt is not None:
        encoder = load_audio_encoder(config.audio_ckpt)
        lineage |= {"audio_enc": fingerprint(Path(config.audio_ckpt))}

    def train() -> Stage:
        steps, mel, data = encoder.num_steps, encoder.config.mel, config.data
        training = Transcribed(
            parts.training, mel, steps, Augmentation(data.spec_augment, data.warp, data.noise), "training", data
        )
        validation = Transcribed(parts.validation, mel, steps, Augmentation(), "validation", data)

        def evaluate(model: AudioEncoder) -> dict[str, float]:
            total, characters = 0.0, 0
            found = Recognition([], [])
            batches = ordered_batches(validation, config.train.batch_size, config.run.val_batches, rules=config.data)
            for batch in batches:
                batch = batch.to(precision.device)
                output = model(batch.frames_BFM, batch.num_frames_B)
                total += float(ctc_loss_sum(output, batch.symbols_BS, batch.num_symbols_B))
                characters += batch.counts["characters"]
                found.hypotheses += transcripts(output)
                found.references += batch.texts
            cer = found.cer().value
            return {"loss": total / characters, "wer": found.wer().value, "cer": cer, "token_accuracy": max(0, 1 - cer)}

        stream = BatchStream(
            training,
            config.train.batch_size,
            config.run.seed,
            training.lengths,
            config.run.num_workers,
            short_first=config.audio_ckpt is None,  # who hears already needs no easy beginning
            rules=config.data,
            left_out=parts.left_out + training.recordings.left_out,
        )
        return Stage([encoder], stream, loss, evaluate, config.train, {"characters": 1.0}, unit="frames")

    return Run(
        kind="audio_enc",
        model=encoder,
        phases=[("train", train)],
        model_config=to_dict(encoder.config),
        data_may_change=config.data.on_bad_sample == "skip",
        lineage=lineage,
    )


if __name__ == "__main__":
    sys.exit(run_stage(AudioConfig, build))
