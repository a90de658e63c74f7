"""Stage A's figures: bits per byte and perplexity of held-out text."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from omni.data.text import TextBatch
from omni.metrics import Figure, ratio, with_cases
from omni.models.thinker import Thinker
from omni.tokenizer import IGNORE, Tokenizer


class TextLikelihood:
    """Adds up how well a Thinker predicts text, window by window.

    Bits per byte compare models with different vocabularies: the bits of all predicted tokens over the UTF-8 bytes
    that these tokens stand for. The first token of a window is context, not prediction.
    """

    def __init__(self, thinker: Thinker, tokenizer: Tokenizer) -> None:
        self.thinker = thinker
        self.bytes_per_token = token_bytes(tokenizer)
        self.nats: list[float] = []
        self.bytes: list[float] = []
        self.tokens: list[float] = []
        self.right_answers: list[float] = []  # tokens of the assistant that were the most likely ones
        self.answers: list[float] = []

    @torch.no_grad()
    def add(self, batch: TextBatch) -> None:
        """Predict one batch of windows."""
        states = self.thinker(self.thinker.embed(batch.tokens_BT), mask=batch.segments).final_BTD
        logits = self.thinker.logits(states).float()
        nats_BT = F.cross_entropy(logits.transpose(1, 2), batch.labels_BT, reduction="none", ignore_index=IGNORE)
        self.nats += nats_BT.sum(1).tolist()
        for row in batch.labels_BT.cpu().numpy():
            predicted = row[row != IGNORE]
            self.bytes.append(float(self.bytes_per_token[predicted].sum()))
            self.tokens.append(len(predicted))
        right_BT = (logits.argmax(-1) == batch.labels_BT) & batch.answers_BT
        self.right_answers += right_BT.sum(1).tolist()
        self.answers += batch.answers_BT.sum(1).tolist()

    def figures(self) -> dict[str, float]:
        """Validation figures: loss in nats a token, perplexity, bits per byte; of chats the share of right tokens."""
        loss = sum(self.nats) / sum(self.tokens)
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 50)), "bits_per_byte": self.bits_per_byte().value}
        if sum(self.answers):
            figures["answer_accuracy"] = sum(self.right_answers) / sum(self.answers)
        return figures

    def bits_per_byte(self) -> Figure:
        """With a bootstrap interval over windows."""
        return ratio([nats / math.log(2) for nats in self.nats], self.bytes, said=self._said())

    def perplexity(self) -> Figure:
        """The exponential of the mean loss a token."""
        loss = ratio(self.nats, self.tokens)
        return with_cases(Figure(math.exp(loss.value), loss.n, math.exp(loss.low), math.exp(loss.high)), self._said())

    def _said(self) -> list[dict[str, float]]:
        """What was measured of each window."""
        columns = zip(self.nats, self.tokens, self.bytes, strict=True)
        return [{"nats": nats, "tokens": tokens, "bytes": size} for nats, tokens, size in columns]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for, [V]."""
    return np.array([tokenizer.num_bytes(token) for token in range(tokenizer.vocab_size)], dtype=np.int64)
