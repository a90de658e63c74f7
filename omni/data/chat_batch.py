"""Encoded chats as one batch for the model, with the features of their pictures and recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
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
        positions_N: positions that each recording's states take.
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
    sizes_B = np.array([len(chat.tokens) for chat in chats])
    if joined:
        valid = np.arange(pad_to(int(sizes_B.sum()), 64))[None] < sizes_B.sum()  # a multiple: few shapes
    elif left:
        valid = np.arange(sizes_B.max())[::-1] < sizes_B[:, None]
    else:
        valid = np.arange(pad_to(int(sizes_B.max()), 16)) < sizes_B[:, None]

    def laid_out(values_N: np.ndarray, fill: int) -> torch.Tensor:
        """What all chats have, one behind the other, where it belongs in the rows."""
        rows = np.full(valid.shape, fill, dtype=values_N.dtype)
        rows[valid] = values_N  # row by row, as both are
        return torch.from_numpy(rows)

    labels = laid_out(np.concatenate([chat.labels for chat in chats]), IGNORE)
    replay = laid_out(np.repeat([chat.replay for chat in chats], sizes_B), False)
    within_N = np.arange(sizes_B.sum()) - np.repeat(sizes_B.cumsum() - sizes_B, sizes_B)
    images = [image_features(path) for chat in chats for path in chat.images]
    audios = [audio_features(path) for chat in chats for path in chat.audios]
    positions_N = torch.tensor([size for chat in chats for size in chat.audio_positions], dtype=torch.long)
    counts = {
        "answers": int(((labels != IGNORE) & ~replay).sum()),
        "replay": int(((labels != IGNORE) & replay).sum()),
        "tokens": int(sizes_B.sum()),
    }
    return ChatBatch(
        counts,
        laid_out(np.concatenate([chat.tokens for chat in chats]), pad_id),
        labels,
        replay,
        torch.from_numpy(np.ascontiguousarray(valid)),
        torch.stack(images) if images else torch.zeros(0, 0, 0),
        pad_sequence(audios, batch_first=True) if audios else torch.zeros(0, 0, 0),
        positions_N,
        segments=Segments([*sizes_B, valid.size - sizes_B.sum()]) if joined else None,
        positions_BT=laid_out(within_N, 0) if joined else None,
    )
