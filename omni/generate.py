"""Answers, token by token: batched decoding with a KV cache, greedy or sampled, to text and hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from omni.answer_text import AnswerText
from omni.data.dialogue import ChatBatch, Encoded, collate_chats
from omni.models.layers import KVCache
from omni.models.omni import OmniModel
from omni.models.thinker import Thinker
from omni.sampling import GREEDY, Chances, Sampling, choose
from omni.tokenizer import Tokenizer


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


class Decoding:
    """Tokens of several rows, step by step, with a KV cache.

    Args:
        thinker: the Thinker.
        embeddings_BTD: prompts, padded on the left.
        valid_BT: False at padding; padding is neither attended to nor counted in positions.
        sampling: how tokens are drawn; a row draws what it would draw alone.
        states_of: layers whose states are kept.

    Attributes:
        ended_B: rows that have ended, as whoever iterates says; they go on yielding ``end_id``.
        states: of each layer asked for, the pieces [B, T, D] read so far, padding included.
    """

    def __init__(
        self,
        thinker: Thinker,
        embeddings_BTD: torch.Tensor,
        valid_BT: torch.Tensor,
        sampling: Sampling = GREEDY,
        states_of: Sequence[int] = (),
    ) -> None:
        B, T, _ = embeddings_BTD.shape
        self.thinker, self.sampling, self.states_of = thinker, sampling, states_of
        self.ended_B = torch.zeros(B, dtype=torch.bool, device=embeddings_BTD.device)
        self.states: dict[int, list[torch.Tensor]] = {layer: [] for layer in states_of}
        self._room = thinker.config.ctx_len - T
        self._chances = Chances(sampling, [0] * B)
        self._cache = KVCache(thinker.config.num_layers)
        self._valid_BT = valid_BT
        # without padding positions and mask are what they are anyway
        self._padded = not bool(valid_BT.all())
        positions_BT = (valid_BT.cumsum(1) - 1).clamp(min=0)
        self._next_B1 = positions_BT[:, -1:] + 1
        mask = None
        if self._padded:
            # a padding query attends to itself, so that no row of the softmax is empty
            triangle = torch.ones(T, T, dtype=torch.bool, device=embeddings_BTD.device).tril()
            mask = (triangle & valid_BT[:, None, :]) | torch.eye(T, dtype=torch.bool, device=triangle.device)
            mask = mask[:, None]
        self._final_BD = self._read(embeddings_BTD, positions_BT, mask)

    def tokens(self, end_id: int, max_new_tokens: int) -> Iterator[torch.Tensor]:
        """Yield the next token of every row, [B], until all have ended or there is no room left."""
        num_tokens = min(max_new_tokens, self._room)
        for number in range(1, num_tokens + 1):
            with torch.no_grad():
                logits_BV = self.thinker.logits(self._final_BD)
            token_B = choose(logits_BV, self.sampling, self._chances.next(len(self.ended_B)))
            token_B = torch.where(self.ended_B, torch.full_like(token_B, end_id), token_B)
            self.ended_B = self.ended_B | (token_B == end_id)
            yield token_B
            last = number == num_tokens or bool(self.ended_B.all())
            if not last or self.states_of:
                self._final_BD = self._read_tokens(token_B)
            if last:
                return

    @torch.no_grad()
    def _read_tokens(self, token_B: torch.Tensor) -> torch.Tensor:
        mask = None
        if self._padded:
            self._valid_BT = torch.nn.functional.pad(self._valid_BT, (0, 1), value=True)
            mask = self._valid_BT[:, None, None, :]
        final_BD = self._read(self.thinker.embed(token_B[:, None]), self._next_B1, mask)
        self._next_B1 = self._next_B1 + 1
        return final_BD

    @torch.no_grad()
    def _read(self, x_BTD: torch.Tensor, positions_BT: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Final states [B, D] at the last of new positions."""
        output = self.thinker(x_BTD, positions_BT, mask, self._cache, self.states_of)
        for layer, states_BTD in output.hidden_states.items():
            self.states[layer].append(states_BTD)
        return output.final_BTD[:, -1]


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
    """

    def __init__(
        self,
        model: OmniModel,
        tokenizer: Tokenizer,
        prompts: Sequence[Encoded],
        features: Features,
        settings: AnswerSettings,
    ) -> None:
        self.answers: list[Answer] = []
        self._tokenizer, self._settings, self._prompts = tokenizer, settings, prompts
        batch = collate_chats(prompts, features.image, features.audio, tokenizer.pad_id, left=True)
        batch = batch.to(model.thinker.embed_tokens.weight.device)
        self._decoding = Decoding(
            model.thinker, embed_batch(model, batch), batch.valid_BT, settings.sampling, settings.states_of
        )

    def __iter__(self) -> Iterator[list[str]]:
        tokenizer, decoding = self._tokenizer, self._decoding
        ends = frozenset(tokenizer.special.values())  # any mark of the template ends a turn
        texts = [AnswerText(tokenizer, self._settings.stop) for _ in self._prompts]
        self.answers = [Answer([], "", "length") for _ in texts]
        for token_B in decoding.tokens(tokenizer.end_id, self._settings.max_new_tokens):
            pieces = [""] * len(texts)
            for row, token in enumerate(token_B.tolist()):
                answer, text = self.answers[row], texts[row]
                if answer.finish != "length":
                    continue
                if token in ends:
                    answer.finish = "end"
                    continue
                answer.tokens.append(token)
                pieces[row] = text.push(token)
                answer.finish = "stop" if text.stopped else "length"
            done = [answer.finish != "length" for answer in self.answers]
            decoding.ended_B = torch.tensor(done, device=token_B.device)
            yield pieces
        yield [text.end() for text in texts]
        for row, (answer, text) in enumerate(zip(self.answers, texts, strict=True)):
            answer.text, answer.states = text.text, self._states(row, len(answer.tokens))

    def _states(self, row: int, num_tokens: int) -> dict[int, torch.Tensor]:
        """States [T, D] of a row's prompt and answer, without padding."""
        size, states = len(self._prompts[row].tokens), self._decoding.states
        longest = max(len(prompt.tokens) for prompt in self._prompts)
        rows = {layer: torch.cat([piece[row] for piece in pieces]) for layer, pieces in states.items()}
        return {layer: states_TD[longest - size : longest + num_tokens] for layer, states_TD in rows.items()}


def generate(
    model: OmniModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    features: Features,
    settings: AnswerSettings,
    batch_size: int = 64,
) -> list[Answer]:
    """Answers to encoded prompts (:meth:`omni.data.dialogue.ChatEncoder.prompt`), batched by length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        generation = Generation(model, tokenizer, [prompts[row] for row in rows], features, settings)
        for _ in generation:
            pass
        found |= zip(rows, generation.answers, strict=True)
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def embed_batch(model: OmniModel, batch: ChatBatch) -> torch.Tensor:
    """Embeddings of a batch of prompts."""
    heard_NSD = model.project_audio(batch.states_NTD)
    return model.embed(batch.tokens_BT, batch.patches_NPD, heard_NSD, batch.positions_N)
