"""The phase that trains a Talker. Stage D runs it on stage A's Thinker, stage E again on the fine-tuned one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omni.alignment import align, codes_and_embeddings, mean_embeddings, sentences
from omni.config import PhaseConfig, RunConfig
from omni.data.stream import BatchStream, ordered_batches
from omni.data.voices import SentenceBatch, Sentences, Voices
from omni.evaluate.speech_validation import clearest_voice, grade_samples, validate_talker
from omni.generate_speech import Mind
from omni.models.audio_encoder import AudioEncoder
from omni.models.quantizer import neighbour_shares
from omni.models.speech import SpeechModel
from omni.models.talker import talker_losses
from omni.training_utils import Stage


def talker_stage(
    speech: SpeechModel,
    encoder: AudioEncoder,
    mind: Mind | None,
    voices: tuple[Voices, Voices],
    config: PhaseConfig,
    run: RunConfig,
    caches: Sequence[Path],
    val_sentences: int,
    left_out: int = 0,
) -> Stage:
    """Align the recordings, encode them, and describe the Talker's training on them.

    Args:
        speech: the model; its codec and speaker encoder are used as they are.
        encoder: stage B's, for the alignment and for grading.
        mind: the Thinker whose states the Talker gets, and its tokenizer; None: it does without.
        voices: training and validation recordings.
        config: length, batch size and learning rate.
        run: the run's keys.
        caches: folders where alignments, codes and embeddings are looked for; new ones go to the first.
        val_sentences: sentences generated and graded at each validation.
        left_out: rows of the training manifest that cannot be used.
    """
    parts = []
    for part, name in zip(voices, ("training", "validation"), strict=True):
        codes, embeddings_NE = codes_and_embeddings(speech, part, caches)
        aligned = sentences(speech, part, align(encoder, part, caches), codes, mind, name)
        parts.append(Sentences(part, aligned, embeddings_NE))
    if tuple(voices[0].names) == speech.config.voices:
        speech.voices_NE.copy_(mean_embeddings(voices[0], parts[0].embeddings_NE))

    blur = speech.config.talker.target_blur
    shares_KVV = neighbour_shares(speech.codebooks, blur) if blur else None

    def loss(model: Any, batch: SentenceBatch) -> dict[str, torch.Tensor]:
        talker, codes_BTK = speech.talker, batch.codes_BTK
        losses = talker_losses(talker, batch.text(), batch.plan(), codes_BTK, batch.durations_BU, shares_KVV)
        return {"codes": losses.codes, "stop": losses.stop, "durations": losses.durations}

    def evaluate(model: Any) -> dict[str, float]:
        if len(speech.config.voices) > 1:
            texts = map(voices[1].text, range(len(voices[1])))
            speech.clearest.fill_(clearest_voice(speech, encoder, texts, mind))
        batches = (batch.to(speech.device) for batch in ordered_batches(parts[1], 16, run.val_batches))
        return validate_talker(speech, batches) | grade_samples(speech, encoder, voices[1], mind, val_sentences)

    left_out += voices[0].recordings.left_out
    stream = BatchStream(parts[0], config.batch_size, run.seed, parts[0].lengths, run.num_workers, left_out=left_out)
    weights = {"codes": 1.0, "stop": 0.1, "durations": 1.0}
    return Stage([speech.talker], stream, loss, evaluate, config, weights, "frames")
