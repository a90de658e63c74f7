"""Encoded chats as one batch for the model, with the features of their pictures and recordings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from omni.data.dialogue import Encoded
from omni.data.stream import Batch, pad_to
from omni.models.segments import Segments
from omni.tokenizer import IGNORE


@dataclass
class ChatBatch(Batch):
    """Chats one behind the other or padded on the right (training), or padded on the left (generation), and the
    encoder features of their media.

    Attributes:
        tokens_BT: tokens; placeholders where media stand.
        labels_BT: the next token where the assistant speaks, IGNORE elsewhere.
        replay_BT: True where the chat is plain text.
        valid_BT: False at padding.
        patches_NPD: patch tokens of all pictures of the batch, in the order of their placeholders.
        states_NTD: audio encoder states of all recordings, padded with zeros.
        positions_N: positions that each recording takes.
        transcripts_NS: tokens of each recording's transcript, padded.
        num_transcript_N: how many; 0 where there is none, or none that fits.
        pixels_N3HW: the pictures themselves, uint8, where their encoder is trained; ``patches_NPD`` is empty then.
        frames_NFM: log-mel frames of the recordings, padded, likewise; ``states_NTD`` is empty then.
        num_frames_N: how many of them are not padding.
        segments: the chats that stand one behind the other in a single row; None: each has a row.
        positions_BT: of each token in its chat, likewise.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    replay_BT: torch.Tensor
    valid_BT: torch.Tensor
    patches_NPD: torch.Tensor
    states_NTD: torch.Tensor
    positions_N: torch.Tensor
    transcripts_NS: torch.Tensor
    num_transcript_N: torch.Tensor
    pixels_N3HW: torch.Tensor | None = None
    frames_NFM: torch.Tensor | None = None
    num_frames_N: torch.Tensor | None = None
    segments: Segments | None = None
    positions_BT: torch.Tensor | None = None


Features = Callable[[str], torch.Tensor]


def collate_chats(
    chats: Sequence[Encoded],
    image_features: Features,
    audio_features: Features,
    pad_id: int,
    left: bool = False,
    joined: bool = False,
) -> ChatBatch:
    """One batch from encoded chats; features come from whatever computed or kept them.

    Args:
        chats: of which the batch consists.
        image_features: of a picture by its path.
        audio_features: of a recording by its path.
        pad_id: the token of padding.
        left: pad on the left, for generation.
        joined: one row, in which the chats stand one behind the other, so that next to nothing is padding.
    """
    sizes = [len(chat.tokens) for chat in chats]
    if joined:
        B, T = 1, pad_to(sum(sizes), 64)  # a multiple: few shapes, as far as chats allow
        places = [(0, end - size) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
    else:
        B, T = len(chats), max(sizes) if left else pad_to(max(sizes), 16)
        places = [(row, T - size if left else 0) for row, size in enumerate(sizes)]
    tokens, labels, positions = torch.full((B, T), pad_id), torch.full((B, T), IGNORE), torch.zeros(B, T).long()
    valid, replay = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    for chat, size, (row, start) in zip(chats, sizes, places, strict=True):
        where = slice(start, start + size)
        tokens[row, where] = torch.tensor(chat.tokens)
        labels[row, where] = torch.tensor(chat.labels)
        positions[row, where] = torch.arange(size)
        valid[row, where], replay[row, where] = True, chat.replay
    transcripts = [torch.tensor(chat.transcript, dtype=torch.long) for chat in chats for _ in chat.audios]
    images = [image_features(path) for chat in chats for path in chat.images]
    audios = [audio_features(path) for chat in chats for path in chat.audios]
    positions_N = torch.tensor([size for chat in chats for size in chat.audio_positions], dtype=torch.long)
    counts = {
        "answers": int(((labels != IGNORE) & ~replay).sum()),
        "replay": int(((labels != IGNORE) & replay).sum()),
        "transcripts": sum(map(len, transcripts)),
        "tokens": int(valid.sum()),
    }
    return ChatBatch(
        counts,
        tokens,
        labels,
        replay,
        valid,
        torch.stack(images) if images else torch.zeros(0, 0, 0),
        pad_sequence(audios, batch_first=True) if audios else torch.zeros(0, 0, 0),
        positions_N,
        pad_sequence(transcripts, batch_first=True) if transcripts else torch.zeros(0, 0).long(),
        torch.tensor([len(spoken) for spoken in transcripts], dtype=torch.long),
        segments=Segments([*sizes, T - sum(sizes)]) if joined else None,
        positions_BT=positions if joined else None,
    )
