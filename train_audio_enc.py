"""Stage B of five: the audio encoder, trained from random weights to write down what it hears.

Why: its states are how the Thinker will hear, and its alignments are how the Talker will learn timing.

    python train_audio_enc.py --config configs/audio_enc_nano.json

In: a CSV with the columns wav,text[,speaker] (``data.train``; ``data.val``, or a share of it, ``data.val_split``).
Out: ``audio_enc.pt`` in ``save_dir``.
Evaluated by: word error rate of unseen sentences, in seen and in unseen voices (``omni eval --stage audio_enc``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from omni.config import DataConfig, PhaseConfig, StageConfig, to_dict
from omni.data.manifest import hash_files, split_rows
from omni.data.speech import SpeechBatch, Transcribed, read_speech_manifest
from omni.data.stream import BatchStream, ordered_batches
from omni.evaluate.audio_enc import Recognition
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig, ctc_loss_sum, transcripts
from omni.runtime import Precision
from omni.training_utils import Run, Stage, run_stage


@dataclass(frozen=True, kw_only=True)
class SpeechData(DataConfig):
    """Where the recordings are."""

    train: str
    val: str | None = None
    test: str | None = None  # seen voices, unseen sentences; for `omni eval`
    test_voices: str | None = None  # unseen voices
    val_split: float = 0.05
    spec_augment: bool = True


@dataclass(frozen=True, kw_only=True)
class AudioConfig(StageConfig):
    """Configuration of stage B."""

    data: SpeechData
    model: AudioEncoderConfig
    train: PhaseConfig


def loss(encoder: AudioEncoder, batch: SpeechBatch) -> dict[str, torch.Tensor]:
    """CTC over characters, summed."""
    output = encoder(batch.frames_BFM, batch.num_frames_B)
    return {"characters": ctc_loss_sum(output, batch.symbols_BS, batch.num_symbols_B)}


def build(config: AudioConfig, precision: Precision) -> Run:
    """The encoder and its one phase."""
    encoder = AudioEncoder(config.model)

    def train() -> Stage:
        rows = read_speech_manifest(config.data.train)
        if config.data.val:
            parts = rows, read_speech_manifest(config.data.val)
        else:
            parts = split_rows(rows, config.data.val_split)
        training, validation = (
            Transcribed(part, config.model.mel, encoder.num_steps, augment, name)
            for part, augment, name in zip(
                parts, (config.data.spec_augment, False), ("training", "validation"), strict=True
            )
        )

        def evaluate(model: AudioEncoder) -> dict[str, float]:
            total, characters = 0.0, 0
            found = Recognition([], [])
            batches = ordered_batches(validation, config.train.batch_size, config.run.val_batches)
            for number, batch in enumerate(batches):
                batch = batch.to(precision.device)
                output = model(batch.frames_BFM, batch.num_frames_B)
                total += float(ctc_loss_sum(output, batch.symbols_BS, batch.num_symbols_B))
                characters += batch.counts["characters"]
                found.hypotheses += transcripts(output)
                start = number * config.train.batch_size
                found.references += [validation.text(start + i) for i in range(len(batch.num_frames_B))]
            cer = found.cer().value
            return {"loss": total / characters, "wer": found.wer().value, "cer": cer, "token_accuracy": max(0, 1 - cer)}

        stream = BatchStream(
            training,
            config.train.batch_size,
            config.run.seed,
            training.lengths,
            config.run.num_workers,
            short_first=True,
        )
        return Stage([encoder], stream, loss, evaluate, config.train, {"characters": 1.0}, unit="frames")

    return Run(
        kind="audio_enc",
        model=encoder,
        phases=[("train", train)],
        model_config=to_dict(config.model),
        lineage={"data": hash_files(config.data.train, *filter(None, [config.data.val]))},
    )


if __name__ == "__main__":
    sys.exit(run_stage(AudioConfig, build))
