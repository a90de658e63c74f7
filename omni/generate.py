"""Answers, piece by piece: batched decoding, greedy or sampled, to text and hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from omni.answer_text import AnswerText
from omni.data.chat_batch import ChatBatch, collate_chats
from omni.data.dialogue import Encoded
from omni.decoding import Decoding, Draft, Prompts, Tally
from omni.models.omni import OmniModel
from omni.sampling import GREEDY, Sampling
from omni.tokenizer import AUDIO, IMAGE, Tokenizer


class Features(Protocol):
    """Where encoder features of pictures and recordings come from, by name."""

    def image(self, path: str) -> torch.Tensor:
        """Patch tokens [P, D]."""

    def audio(self, path: str) -> torch.Tensor:
        """Audio encoder states [T, D]."""


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are decoded.

    Attributes:
        max_new_tokens: most tokens of an answer; the context length bounds it as well.
        sampling: how tokens are drawn.
        stop: texts, none of them empty, before which an answer ends.
        states_of: layers whose states are wanted (:meth:`omni.models.thinker.Thinker.forward`).
    """

    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    states_of: tuple[int, ...] = ()


@dataclass
class Answer:
    """What was answered to one prompt.

    Attributes:
        tokens: without the token that ended it.
        text: what they say, up to a stop string, without white space around it.
        finish: whether the model ended it, a stop string did, or there was no room for more.
        states: of each layer asked for, [positions of the prompt + tokens, D].
    """

    tokens: list[int]
    text: str
    finish: Literal["end", "stop", "length"]
    states: dict[int, torch.Tensor] = field(default_factory=dict)


class Generation:
    """Answers to a batch of prompts while they are written.

    Iterating gives the next piece of text of each row (often empty, never half a character); then ``answers`` holds
    everything. A row says what it would say alone.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        prompts: from :meth:`omni.data.dialogue.ChatEncoder.prompt`.
        features: of their pictures and recordings.
        settings: how to decode.
        draft: a smaller Thinker that guesses ahead; it changes the speed, and nothing else.
    """

    def __init__(
        self,
        model: OmniModel,
        tokenizer: Tokenizer,
        prompts: Sequence[Encoded],
        features: Features,
        settings: AnswerSettings,
        draft: Draft | None = None,
    ) -> None:
        self.answers: list[Answer] = []
        self._tokenizer, self._settings, self._prompts = tokenizer, settings, prompts
        batch = collate_chats(prompts, features.image, features.audio, tokenizer.pad_id, left=True)
        batch = batch.to(model.thinker.embed_tokens.weight.device)
        self._decoding = Decoding(
            model.thinker,
            Prompts(embed_batch(model, batch), batch.valid_BT),
            settings.sampling,
            settings.states_of,
            draft,
            draft_prompts(draft, tokenizer, prompts) if draft is not None else None,
        )

    @property
    def tally(self) -> Tally:
        """How many passes it took, and what became of the draft's guesses."""
        return self._decoding.tally

    def __iter__(self) -> Iterator[list[str]]:
        tokenizer, decoding = self._tokenizer, self._decoding
        ends = frozenset(tokenizer.special.values())  # any mark of the template ends a turn
        texts = [AnswerText(tokenizer, self._settings.stop) for _ in self._prompts]
        self.answers = [Answer([], "", "length") for _ in texts]
        for runs in decoding.runs(self._settings.max_new_tokens):
            yield [self._add(row, tokens, texts[row], ends) for row, tokens in enumerate(runs)]
        yield [text.end() for text in texts]
        for row, (answer, text) in enumerate(zip(self.answers, texts, strict=True)):
            answer.text = text.text
            answer.states = decoding.states(row, len(self._prompts[row].tokens) + len(answer.tokens))

    def _add(self, row: int, tokens: list[int], text: AnswerText, ends: frozenset[int]) -> str:
        """Add the next tokens of a row to its answer, as far as it goes; returns the text that they make certain."""
        answer, piece = self.answers[row], ""
        for token in tokens:
            if token in ends:
                answer.finish = "end"
            else:
                answer.tokens.append(token)
                piece += text.push(token)
                answer.finish = "stop" if text.stopped else "length"
            if answer.finish != "length":
                self._decoding.ended[row] = True
                break
        return piece


def generate(
    model: OmniModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    features: Features,
    settings: AnswerSettings,
    batch_size: int = 64,
    draft: Draft | None = None,
) -> list[Answer]:
    """Answers to encoded prompts (:meth:`omni.data.dialogue.ChatEncoder.prompt`), batched by length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        generation = Generation(model, tokenizer, [prompts[row] for row in rows], features, settings, draft)
        for _ in generation:
            pass
        found |= zip(rows, generation.answers, strict=True)
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def embed_batch(model: OmniModel, batch: ChatBatch) -> torch.Tensor:
    """Embeddings of a batch of prompts."""
    return model.embed(batch.tokens_BT, batch.patches_NPD, batch.states_NTD, batch.positions_N)


def draft_prompts(draft: Draft, tokenizer: Tokenizer, prompts: Sequence[Encoded]) -> Prompts:
    """Prompts as a draft reads them: without pictures and recordings, of which it knows nothing.

    Left out, not masked: what remains is the kind of chat that stage A's text consists of.
    """
    media = tokenizer.special[IMAGE], tokenizer.special[AUDIO]
    rows = [[token for token in prompt.tokens if token not in media] for prompt in prompts]
    T, weight = max(map(len, rows)), draft.thinker.embed_tokens.weight
    tokens_BT = torch.tensor([[tokenizer.pad_id] * (T - len(row)) + row for row in rows], device=weight.device)
    valid_BT = torch.tensor([[False] * (T - len(row)) + [True] * len(row) for row in rows], device=weight.device)
    with torch.no_grad():
        return Prompts(draft.thinker.embed(tokens_BT), valid_BT)
