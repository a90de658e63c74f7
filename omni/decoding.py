"""Tokens of several rows with a KV cache, one by one, or in runs that a smaller Thinker guesses ahead.

Speculative decoding (Leviathan et al., 2023): a draft guesses the next few tokens, and the Thinker reads them all in
one pass, which on most machines takes little longer than reading one. Guesses are kept as far as they are what the
Thinker itself would have said. Where tokens are drawn, both models draw with the same random numbers, which makes them
agree often (Daliri et al., 2024, "drafter-invariant"); so with a draft a seed gives the very tokens that it gives
without one, which a rule that accepts guesses at random would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from omni.models.kv_cache import Growing, KVCache
from omni.models.thinker import Thinker
from omni.sampling import GREEDY, Chances, Sampling, choose


@dataclass(frozen=True)
class Prompts:
    """What is read before the first token.

    Attributes:
        embeddings_BTD: rows, padded on the left.
        valid_BT: False at padding; padding is neither attended to nor counted in positions.
    """

    embeddings_BTD: torch.Tensor
    valid_BT: torch.Tensor


@dataclass(frozen=True)
class Draft:
    """A Thinker that guesses ahead.

    Attributes:
        thinker: in evaluation mode, with the tokenizer of the one it guesses for.
        num_guesses: tokens that it guesses at a time.
    """

    thinker: Thinker
    num_guesses: int = 4


@dataclass
class Tally:
    """How decoding went: passes of the Thinker after the prompt, guesses that it checked, and those it kept."""

    passes: int = 0
    guessed: int = 0
    kept: int = 0


class Rows:
    """What a Thinker has read of several rows. The last positions can be taken back, of each row another number.

    Args:
        thinker: in evaluation mode.
        prompts: read at once.
        states_of: layers whose states are kept.

    Attributes:
        final_BTD: final states of the positions read last.
    """

    def __init__(self, thinker: Thinker, prompts: Prompts, states_of: Sequence[int] = ()) -> None:
        self.thinker = thinker
        self._cache = KVCache(thinker.config.num_layers)
        self._states = {layer: Growing(1) for layer in states_of}
        # without padding and gaps, positions and mask are what they are anyway
        self._padding = None if bool(prompts.valid_BT.all()) else _Padding(prompts.valid_BT[:, :0])
        self.final_BTD = self._read(prompts.embeddings_BTD, prompts.valid_BT)

    def read(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Read the next tokens of every row; returns the logits [B, T, V] of those that follow them."""
        with torch.no_grad():
            embeddings_BTD = self.thinker.embed(tokens_BT)
        self.final_BTD = self._read(embeddings_BTD)
        return self.logits(tokens_BT.shape[1])

    @torch.no_grad()
    def logits(self, count: int) -> torch.Tensor:
        """Logits [B, count, V] after the last ``count`` positions read."""
        return self.thinker.logits(self.final_BTD[:, -count:])

    def take_back(self, counts_B: torch.Tensor) -> None:
        """Forget the last ``counts_B`` positions of each row, none of them padding or taken back before."""
        least, most = int(counts_B.min()), int(counts_B.max())
        S = self._cache.length
        if most > least and self._padding is None:
            self._padding = _Padding(torch.ones(len(counts_B), S, dtype=torch.bool, device=counts_B.device))
        if self._padding is not None:
            self._padding.take_back(counts_B, least)
        self._cache.cut(S - least)
        for states in self._states.values():
            states.cut(S - least)

    def states(self, row: int, count: int) -> dict[int, torch.Tensor]:
        """States [count, D] of the first positions of a row, padding and what was taken back left out."""
        where_S = slice(None) if self._padding is None else self._padding.valid_BS[row]
        return {layer: states.whole[row][where_S][:count] for layer, states in self._states.items()}

    @torch.no_grad()
    def _read(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Final states [B, T, D] of new positions, all of them valid or as told."""
        positions_BT = mask = None
        if self._padding is not None:
            valid_BT = torch.ones_like(x_BTD[..., 0], dtype=torch.bool) if valid_BT is None else valid_BT
            positions_BT, mask = self._padding.add(valid_BT)
        output = self.thinker(x_BTD, positions_BT, mask, self._cache, list(self._states))
        for layer, states_BTD in output.hidden_states.items():
            self._states[layer].append(states_BTD)
        return output.final_BTD


class _Padding:
    """Which positions of several rows hold something: padding, and what single rows took back, hold nothing.

    Args:
        valid_BS: of the positions so far.
    """

    def __init__(self, valid_BS: torch.Tensor) -> None:
        self.valid_BS = valid_BS
        self._next_B1 = valid_BS.sum(1, keepdim=True)

    def add(self, valid_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new positions; returns their numbers [B, T] in their rows, and which positions they see."""
        positions_BT = (self._next_B1 + valid_BT.cumsum(1) - 1).clamp(min=0)
        mask = self._mask(valid_BT)
        self.valid_BS = torch.cat([self.valid_BS, valid_BT], dim=1)
        self._next_B1 = self._next_B1 + valid_BT.sum(1, keepdim=True)
        return positions_BT, mask

    def take_back(self, counts_B: torch.Tensor, cut: int) -> None:
        """Each row takes back its last ``counts_B`` positions, of which all rows lose the last ``cut``."""
        S = self.valid_BS.shape[1] - cut
        behind_S = torch.arange(S, 0, -1, device=counts_B.device)
        # a row that takes back more keeps the positions as a gap
        self.valid_BS = self.valid_BS[:, :S] & (behind_S[None] > (counts_B - cut)[:, None])
        self._next_B1 = self._next_B1 - counts_B[:, None]

    def _mask(self, valid_BT: torch.Tensor) -> torch.Tensor:
        """Which of the old and new positions each new one sees, [B, 1, T, S + T]."""
        T, device = valid_BT.shape[1], valid_BT.device
        triangle = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        # a padding query attends to itself, so that no row of the softmax is empty
        new_BTT = (triangle & valid_BT[:, None, :]) | torch.eye(T, dtype=torch.bool, device=device)
        old_BTS = self.valid_BS[:, None, :].expand(-1, T, -1)
        return torch.cat([old_BTS, new_BTT], dim=-1)[:, None]


class _Guesser:
    """A draft at work: it follows the rows, and guesses how they go on.

    Args:
        draft: which, and how far ahead.
        prompts: what it reads before the first token.
        sampling: how the Thinker's tokens are drawn, and so its own.
    """

    def __init__(self, draft: Draft, prompts: Prompts, sampling: Sampling) -> None:
        self._rows, self._sampling = Rows(draft.thinker, prompts), sampling
        self._unread_BT = torch.empty(0)
        self.num_guesses = draft.num_guesses

    def begin(self, first_B: torch.Tensor) -> None:
        """The first token of every row."""
        self._unread_BT = first_B[:, None]

    def guess(self, count: int, chances_BN: torch.Tensor | None) -> torch.Tensor:
        """The next tokens [B, count] of every row, drawn by the numbers that the Thinker will draw by."""
        guesses, unread_BT = list[torch.Tensor](), self._unread_BT
        for number in range(count):
            logits_BV = self._rows.read(unread_BT)[:, -1]
            guesses.append(choose(logits_BV, self._sampling, None if chances_BN is None else chances_BN[:, number]))
            unread_BT = guesses[-1][:, None]
        return torch.stack(guesses, dim=1)

    def follow(self, guesses_BN: torch.Tensor, kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """Keep the first guesses of each row, after which the Thinker said something else.

        The last guess was not read. So that all rows have as many tokens to read, the one before the next is read anew.
        """
        self._rows.take_back(guesses_BN.shape[1] - kept_B)
        said_BN = torch.cat([self._unread_BT[:, -1:], guesses_BN], dim=1)
        self._unread_BT = torch.stack([said_BN.gather(1, kept_B[:, None])[:, 0], next_B], dim=1)


class Decoding:
    """Tokens of several rows.

    Args:
        thinker: in evaluation mode.
        prompts: where each row begins.
        sampling: how tokens are drawn; a row draws what it would draw alone.
        states_of: layers whose states are kept.
        draft: guesses ahead, and changes nothing of what is said.
        draft_prompts: what the draft reads before the first token; the same rows, as far as it understands them.

    Attributes:
        ended: of each row whether it has ended, as whoever iterates says.
        tally: how it went.
    """

    def __init__(
        self,
        thinker: Thinker,
        prompts: Prompts,
        sampling: Sampling = GREEDY,
        states_of: Sequence[int] = (),
        draft: Draft | None = None,
        draft_prompts: Prompts | None = None,
    ) -> None:
        B = len(prompts.valid_BT)
        self.ended = [False] * B
        self.tally = Tally()
        self._sampling, self._states_of = sampling, states_of
        self._rows = Rows(thinker, prompts, states_of)
        self._room = [thinker.config.ctx_len - length for length in prompts.valid_BT.sum(1).tolist()]
        self._chances = Chances(sampling, [0] * B)
        self._guesser = _Guesser(draft, draft_prompts or prompts, sampling) if draft is not None else None

    def states(self, row: int, count: int) -> dict[int, torch.Tensor]:
        """States [count, D] of the first positions of a row, by layer."""
        return self._rows.states(row, count)

    def runs(self, max_new_tokens: int) -> Iterator[list[list[int]]]:
        """Yield the next tokens of every row, at least one of those that go on, none of those that have ended.

        A row ends where whoever iterates sets ``ended``, after ``max_new_tokens`` and where the context is full.
        """
        limits = [min(room, max_new_tokens) for room in self._room]  # tokens; counted here, where no device is asked
        numbers_BN = self._chances.next_several(len(limits), max(0, *limits))
        said = [0] * len(limits)
        self.ended = [ended or limit <= 0 for ended, limit in zip(self.ended, limits, strict=True)]
        if all(self.ended):
            return
        next_B = self._choose(self._rows.logits(1), self._numbers(numbers_BN, said, 1))[:, 0]
        run_BN, sizes = next_B[:, None], [1] * len(said)
        if self._guesser:
            self._guesser.begin(next_B)
        while True:
            sizes = [
                0 if ended else min(size, limit - before)
                for ended, size, limit, before in zip(self.ended, sizes, limits, said, strict=True)
            ]  # fmt: skip
            said = [before + size for before, size in zip(said, sizes, strict=True)]
            yield [row[:size] for row, size in zip(run_BN.tolist(), sizes, strict=True)]
            self.ended = [
                ended or so_far >= limit for ended, so_far, limit in zip(self.ended, said, limits, strict=True)
            ]
            if all(self.ended):
                break
            most = max(
                limit - so_far for ended, so_far, limit in zip(self.ended, said, limits, strict=True) if not ended
            )
            run_BN, next_B, sizes = self._next_run(next_B, most, numbers_BN, said)
        if self._states_of:
            self._rows.read(next_B[:, None])

    def _next_run(
        self, next_B: torch.Tensor, most: int, numbers_BN: torch.Tensor | None, said: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """What follows the tokens ``next_B``: tokens [B, N], the last one of each row, and how many a row says."""
        # where one token is left, nothing is guessed any more, so the draft need not follow either
        count = min(self._guesser.num_guesses, most - 1) if self._guesser else 0
        numbers_BN = self._numbers(numbers_BN, said, count + 1)
        if self._guesser and count:
            return self._guessed_run(self._guesser, next_B, count, numbers_BN)
        self.tally.passes += 1
        run_B1 = self._choose(self._rows.read(next_B[:, None]), numbers_BN)
        return run_B1, run_B1[:, 0], [1] * len(said)

    def _guessed_run(
        self, guesser: _Guesser, next_B: torch.Tensor, count: int, numbers_BN: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """The same with so many guesses, of which each row keeps some."""
        guesses_BN = guesser.guess(count, numbers_BN)
        self.tally.passes += 1
        logits_BNV = self._rows.read(torch.cat([next_B[:, None], guesses_BN], dim=1))
        run_BN = self._choose(logits_BNV, numbers_BN)
        # a guess counts while it and all before it are what the Thinker says
        kept_B = (run_BN[:, :-1] == guesses_BN).cumprod(1).sum(1)
        kept_B = kept_B.masked_fill(torch.tensor(self.ended, device=kept_B.device), 0)
        kept = kept_B.tolist()
        self.tally.guessed += count * self.ended.count(False)
        self.tally.kept += sum(kept)
        self._rows.take_back(count - kept_B)
        next_B = run_BN.gather(1, kept_B[:, None])[:, 0]
        guesser.follow(guesses_BN, kept_B, next_B)
        return run_BN, next_B, [number + 1 for number in kept]

    def _choose(self, logits_BNV: torch.Tensor, numbers_BN: torch.Tensor | None) -> torch.Tensor:
        """A token [B, N] for each position."""
        chosen = choose(logits_BNV.flatten(0, 1), self._sampling, None if numbers_BN is None else numbers_BN.flatten())
        return chosen.view(logits_BNV.shape[:2])

    @staticmethod
    def _numbers(numbers_BN: torch.Tensor | None, said: Sequence[int], count: int) -> torch.Tensor | None:
        """The random numbers [B, count] that decide the next tokens; those beyond a row's last are never used."""
        if numbers_BN is None:
            return None
        at_BN = torch.tensor(said)[:, None] + torch.arange(count)
        return numbers_BN.gather(1, at_BN.clamp(max=numbers_BN.shape[1] - 1))
