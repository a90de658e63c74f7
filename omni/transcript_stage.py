"""Stage E's first phase: the audio projector learns to hear the Thinker's tokens, without the Thinker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from omni.config import PhaseConfig, RunConfig, UserError
from omni.data.chat_batch import ChatBatch
from omni.data.dialogue import Chat, ChatEncoder, Encoded, Message, Part
from omni.data.manifest import Row
from omni.data.mixture import ChatSamples
from omni.data.stream import BatchStream, ordered_batches
from omni.metrics import word_error_rate
from omni.models.omni import OmniModel
from omni.models.transcript import read_tokens, transcript_loss_sum
from omni.runtime import log
from omni.tokenizer import spoken_text
from omni.training_types import Stage


def as_chats(rows: Sequence[Row]) -> list[Chat]:
    """Rows of a speech manifest as chats that ask for a transcript and get it."""
    found = []
    for row in rows:
        text = str(row.values["text"])
        asked = Message("user", (Part("audio", str(row.path("wav"))),))
        found.append(Chat(row.where, [asked, Message("assistant", (Part("text", text),))], "asr", transcript=text))
    return found


def refuse_without_transcripts(manifest: str, chats: Sequence[Chat], recordings: Sequence[Row]) -> None:
    """Stop where recordings shall enter as words and nothing says which words are in any of them.

    Raises:
        UserError: when no chat with a recording has a transcript, and there is no table of recordings.
    """
    with_sound = [chat for chat in chats if chat.paths("audio")]
    if with_sound and not recordings and not any(chat.transcript for chat in with_sound):
        raise UserError(
            f'{manifest}: found {len(with_sound)} chats with recordings and no "transcript" in any of them, expected '
            "some that say what is said there, so that words can be heard; add them, name stage B's recordings as "
            "data.recordings with a phase transcripts, or set hear_words to false"
        )


def transcript_stage(
    model: OmniModel,
    encoder: ChatEncoder,
    collate: Callable[[Sequence[Encoded]], ChatBatch],
    chats: tuple[Sequence[Chat], Sequence[Chat]],
    config: PhaseConfig,
    run: RunConfig,
    left_out: int = 0,
) -> Stage:
    """Describe the phase.

    A recording costs about a fifth of what it does in a step through the Thinker (size micro, two cores), so that words
    that occur in few chats are heard often.

    Args:
        model: of which the audio projector and the transcript head are trained.
        encoder: makes tokens of the transcripts.
        collate: makes a batch, with what the recordings were encoded to.
        chats: to train on and to validate on; those that count have a transcript that fits.
        config: length, batch size and learning rate.
        run: the run's keys.
        left_out: chats that cannot be used.
    """
    tokenizer, parts = encoder.tokenizer, []
    for part in chats:
        found = [
            encoder.example([Message("user", (Part("audio", chat.paths("audio")[0]),))], chat.transcript, chat.where)
            for chat in part
            if chat.transcript and len(chat.paths("audio")) == 1
        ]
        heard = [chat for chat in found if chat.transcript]  # else it does not fit
        if len(heard) < len(found):
            log.info("%d transcripts have more tokens than their recordings have positions", len(found) - len(heard))
        parts.append(ChatSamples(heard, ["all"] * len(heard), {}, collate))

    def loss_sum(log_probs_NSV: torch.Tensor, batch: ChatBatch) -> torch.Tensor:
        return transcript_loss_sum(log_probs_NSV, batch.positions_N, batch.transcripts_NS, batch.num_transcript_N)

    def loss(model: OmniModel, batch: ChatBatch) -> dict[str, torch.Tensor]:
        return {"transcripts": loss_sum(model.transcribe(batch.states_NTD), batch)}

    def evaluate(model: OmniModel) -> dict[str, float]:
        total, targets, said, heard = 0.0, 0, list[str](), list[str]()
        for batch in ordered_batches(parts[1], 32, run.val_batches, parts[1].lengths):
            batch = batch.to(next(model.parameters()).device)
            log_probs_NSV = model.transcribe(batch.states_NTD)
            total += float(loss_sum(log_probs_NSV, batch))
            targets += batch.counts["transcripts"]
            rows = zip(batch.transcripts_NS.tolist(), batch.num_transcript_N.tolist(), strict=True)
            said += [spoken_text(tokenizer.decode(tokens[:size])) for tokens, size in rows]
            heard += [spoken_text(tokenizer.decode(tokens)) for tokens in read_tokens(log_probs_NSV, batch.positions_N)]
        return {"loss": total / targets, "wer": word_error_rate(said, heard).value}

    trains: list[torch.nn.Module] = [model.audio_projector, model.transcript_head]
    stream = BatchStream(parts[0], config.batch_size, run.seed, parts[0].lengths, run.num_workers, left_out=left_out)
    return Stage(trains, stream, loss, evaluate, config, {"transcripts": 1.0}, unit="transcripts")
