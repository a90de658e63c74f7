"""The Thinker's states for what the Talker speaks: what a word means where it stands, at the word's last token."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from omni.models.kv_cache import KVCache
from omni.models.thinker import Thinker
from omni.speech_text import SpokenWord
from omni.tokenizer import Tokenizer, plain_text


class StateReader:
    """States of a text that arrives in pieces, the same as :func:`word_states` gives for all of it.

    Args:
        thinker: in evaluation mode.
        tokenizer: the Thinker's.
        layer: whose states are meant.
    """

    def __init__(self, thinker: Thinker, tokenizer: Tokenizer, layer: int) -> None:
        self.thinker, self.tokenizer, self.layer = thinker, tokenizer, layer
        self._cache = KVCache(thinker.config.num_layers)
        self._tokens: list[int] = []
        self._states: list[torch.Tensor] = []  # [D] of every token read

    @torch.no_grad()
    def read(self, text: str, words: Sequence[SpokenWord]) -> torch.Tensor:
        """States [1 + 2 W, D] of the pauses and words of a text that begins with the one read before.

        Both must end where a word ends, with white space behind it or the end of the text: tokens never span that.
        """
        tokens = self.tokenizer.encode(_spaced(text))
        assert tokens[: len(self._tokens)] == self._tokens
        device = self.thinker.embed_tokens.weight.device
        while new := tokens[len(self._states) :]:
            if self._cache.length == self.thinker.config.ctx_len:
                self._cache = KVCache(self.thinker.config.num_layers)
            new = new[: self.thinker.config.ctx_len - self._cache.length]
            x = self.thinker.embed(torch.tensor([new], device=device))
            self._states += self.thinker(x, cache=self._cache, states_of=[self.layer]).hidden_states[self.layer][0]
        self._tokens = tokens
        return _at_words(torch.stack(self._states), self.tokenizer, tokens, text, words)


@torch.no_grad()
def word_states(
    thinker: Thinker,
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, Sequence[SpokenWord]]],
    layer: int,
    batch_size: int = 32,
) -> list[torch.Tensor]:
    """The Thinker's states [U, D] for the units of each text: of a word the state at its last token.

    A pause has the state of the word before it; the pause before the first word has the first token's.
    """
    tokens = [tokenizer.encode(_spaced(text)) for text, _ in texts]
    # what is longer than the Thinker's context is read in windows
    length = thinker.config.ctx_len
    windows = [
        (number, row[at : at + length]) for number, row in enumerate(tokens) for at in range(0, len(row), length)
    ]
    order = sorted(range(len(windows)), key=lambda index: len(windows[index][1]))
    device, read = thinker.embed_tokens.weight.device, [torch.empty(0)] * len(windows)
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        # padded on the right, where no token looks
        rows = [torch.tensor(windows[index][1]) for index in picked]
        tokens_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id).to(device)
        states_BTD = thinker(thinker.embed(tokens_BT), states_of=[layer]).hidden_states[layer]
        for index, row, states_TD in zip(picked, rows, states_BTD, strict=True):
            read[index] = states_TD[: len(row)]
    whole: list[list[torch.Tensor]] = [[] for _ in texts]
    for (number, _), states_TD in zip(windows, read, strict=True):
        whole[number].append(states_TD)
    return [
        _at_words(torch.cat(parts), tokenizer, row, *text)
        for parts, row, text in zip(whole, tokens, texts, strict=True)
    ]


def _spaced(text: str) -> str:
    """The text as the Thinker reads it: no special tokens, and spaces alone as white space, which no token spans."""
    return re.sub(r"\s", " ", plain_text(text))


def _at_words(
    states_TD: torch.Tensor, tokenizer: Tokenizer, tokens: Sequence[int], text: str, words: Sequence[SpokenWord]
) -> torch.Tensor:
    return states_at_words(states_TD, [tokenizer.num_bytes(token) for token in tokens], text, words)


def states_at_words(
    states_TD: torch.Tensor, token_bytes: Sequence[int], text: str, words: Sequence[SpokenWord]
) -> torch.Tensor:
    """States [U, D] of a text's units from those of its tokens, each of which stands for some of its bytes."""
    ends = torch.tensor(token_bytes).cumsum(0)
    wanted = torch.tensor([len(_spaced(text[: word.end]).encode()) for word in words])
    tokens = torch.searchsorted(ends, wanted).clamp(max=len(ends) - 1)
    return states_TD[torch.cat([tokens.new_zeros(1), tokens.repeat_interleave(2)]).to(states_TD.device)]
