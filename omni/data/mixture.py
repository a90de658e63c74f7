"""Chats of several tasks and replayed text as one set of training samples, each as often as the configuration says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from omni.config import UserError
from omni.data.chat_batch import ChatBatch
from omni.data.dialogue import Encoded
from omni.data.stream import Quota
from omni.data.text import document_spans
from omni.tokenizer import Tokenizer


def replayed(name: str, tokens: np.ndarray, tokenizer: Tokenizer, ctx_len: int) -> list[Encoded]:
    """The documents of stage A's text as chats in which every token is a label.

    Args:
        name: of the text, for messages.
        tokens: the text's.
        tokenizer: which made them.
        ctx_len: tokens of a document, at most; longer ones become several.
    """
    pieces = (tokens[start:end].tolist() for start, end in document_spans(tokens, tokenizer, ctx_len))
    where = f"{name}: document"
    return [
        Encoded(piece[:-1], piece[1:], replay=True, where=f"{where} {number}") for number, piece in enumerate(pieces, 1)
    ]


class ChatSamples:
    """Chats as training samples, each task as often as its weight says, mixed with documents of stage A's text.

    Args:
        chats: encoded chats.
        tasks: the task of each.
        task_weights: how often a task's chats occur in an epoch (1: once; 0: never; 0.5: half of them, drawn anew each
            epoch); tasks not named have weight 1.
        collate: makes a batch.
        replay: windows of text as encoded chats whose every token is a label; ``replay_share`` of all samples.
        replay_anew: each epoch replays other documents, out of all; else the first ones.
        load: puts pictures and recordings themselves into a sample, where their encoders are trained.

    Raises:
        UserError: for a weight of a task that there is not, or when the weights leave no chat.
    """

    def __init__(
        self,
        chats: Sequence[Encoded],
        tasks: Sequence[str],
        task_weights: dict[str, float],
        collate: Callable[[Sequence[Encoded]], ChatBatch],
        replay: Sequence[Encoded] = (),
        replay_share: float = 0.0,
        replay_anew: bool = False,
        load: Callable[[Encoded], Encoded] | None = None,
    ) -> None:
        unknown = [task for task in task_weights if task not in tasks]
        if unknown:
            raise UserError(f"task_weights: found {unknown[0]!r}, expected one of {', '.join(sorted(set(tasks)))}")
        self._collate, self._load = collate, load
        self.samples: list[Encoded] = []
        quotas = []
        for task in sorted(set(tasks)):
            group = [chat for chat, name in zip(chats, tasks, strict=True) if name == task]
            weight = task_weights.get(task, 1.0)
            if weight > 0:
                quotas.append(self._add(group, max(1, round(len(group) * weight))))
        if chats and not quotas:
            raise UserError("task_weights: found 0 for every task, expected more than 0 for one of them at least")
        self.num_chats = sum(quota.count for quota in quotas)
        wanted = round(self.num_chats * replay_share / (1 - replay_share)) if replay else 0
        if replay_anew and wanted:
            quotas.append(self._add(replay, wanted))
        elif wanted:
            quotas.append(self._add([replay[i % len(replay)] for i in range(wanted)], wanted))
        # without quotas an epoch is every sample once
        self.quotas = quotas if task_weights or replay_anew else []

    def _add(self, group: Sequence[Encoded], count: int) -> Quota:
        first = len(self.samples)
        self.samples += group
        return Quota(first, len(self.samples), count)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """Positions of each sample, for batches of similar length."""
        return [len(chat.tokens) for chat in self.samples]

    def where(self, index: int) -> str:
        """``file:line`` of a chat, or which replayed text it is."""
        return self.samples[index].where

    def sample(self, index: int, rng: np.random.Generator | None) -> Encoded:
        """An encoded chat or window of text."""
        return self.samples[index] if self._load is None else self._load(self.samples[index])

    def collate(self, samples: list[Any]) -> ChatBatch:
        """One right-padded batch."""
        return self._collate(samples)
