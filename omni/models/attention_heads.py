"""Heads that begin with a task: some look a number of tokens back, some find where a word stood and what was near it.

To look something up ("a red cup ... what colour is the cup?") a decoder needs heads in a row: some that say at each
position what stood 1, 2, 3 tokens before it, one that finds the position after which the word at hand stood (induction
heads; Olsson et al., 2022) and hands on what was said there, and one that brings it to where the answer is written.
From random weights none has a gradient before the others are there, and a small Thinker waits for it through most of
its training. As mimetic initialization does (Trockman and Kolter, 2023), this gives such heads their form and leaves
all else random: no word is known, and every weight is trained. docs/log.md has what it gives: of two or three things
told of, the colour of the one that is asked for is right in all cases after 300 steps, at chance without.

Everything that is handed on is said in one code, a projection of embeddings, so that the last head's output is the
word itself. Heads should be 64 wide: of 32 numbers the 20 that slow rotary frequencies leave do not tell words apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from omni.models.layers import Attention

_COMMON = 0.5  # length of what all embeddings share; rows are of length 1 beside it
_FREQUENCIES = (0.4, 0.3, 0.2, 0.1)  # shares of the fastest rotary frequencies in "so many tokens back"
_SHARPNESS = 1.5  # gain of queries times gain of keys
_LOUDNESS = 0.18  # what a head adds to the residual stream is then about as long as an embedding
_NOISE = 0.1  # of the usual random weights, in queries and keys of such a head


@dataclass(frozen=True)
class Find:
    """Find the position ``after`` tokens behind the word at hand where it stood before; say what was ``before`` it.

    So the head tells what stood ``after - before`` tokens from the word; ``before`` 0 is what stands there itself.
    """

    after: int
    before: int


# of the heads of the first layer, how far they look back
_FIRST = (1, 2, 3, 5, 4, 6)
# of the key/value heads of the layers between, in turn: a Find, a distance to look back, or None: no task
_Task = Find | int | None
Task = TypeVar("Task")
_BETWEEN: tuple[tuple[_Task, ...], ...] = (
    (Find(1, 0), Find(1, 2), Find(1, 5), None, Find(1, 3), Find(4, 0)),
    (Find(1, 0), Find(1, 3), Find(3, 0), 3, 4, Find(1, 6)),
)
# and how far the last layer's first heads do: a question's last word stands three tokens before its answer, four before
# the second word of that
_LAST = (3, 4)


def start_by_copying(attention: Attention, copy: float = 0.3, match: float = 0.2) -> None:
    """Let attention begin as what it will have to be: queries look for keys like themselves, and copy what is there.

    Products of query and key matrices, and of value and output matrices, have a share of the identity from the start
    (mimetic initialization, Trockman and Kolter, 2023). Measured on sequences that repeat themselves: a Thinker of nano
    size predicts the repetition after 50 to 100 steps of AdamW instead of 200.

    Args:
        attention: freshly initialized.
        copy: share of the values that the output hands on.
        match: share of a query's weights, in variance, that are its key's.
    """
    groups = attention.num_heads // attention.num_kv_heads
    with torch.no_grad():
        k, v = (
            part.weight.unflatten(0, (attention.num_kv_heads, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)
            for part in (attention.k_proj, attention.v_proj)
        )
        attention.q_proj.weight.mul_(math.sqrt(1 - match)).add_(k, alpha=math.sqrt(match))
        attention.o_proj.weight.copy_(copy * v.T)


def start_with_tasks(embed_tokens: nn.Embedding, attentions: Sequence[Attention], theta: float) -> None:
    """Give embeddings a common direction, and heads a task each.

    Args:
        embed_tokens: rows of length about 1.
        attentions: of the layers in order, freshly initialized.
        theta: base of the rotary frequencies.
    """
    with torch.no_grad():
        dim, d = embed_tokens.embedding_dim, attentions[0].head_dim
        common_D = torch.randn(dim)
        common_D /= common_D.norm()
        along_V1 = (embed_tokens.weight @ common_D)[:, None]
        embed_tokens.weight.add_((_COMMON - along_V1) * common_D)
        word_dD = _orthonormal(d, dim)  # the code in which words are handed on
        word_dD -= (word_dD @ common_D)[:, None] * common_D
        for attention in attentions:
            for part in (attention.q_norm, attention.k_norm):
                part.weight.fill_(math.sqrt(_SHARPNESS))
        first, last = attentions[0], attentions[-1]
        places = {back: _orthonormal(d, dim) for back in _FIRST[: first.num_heads]}  # where it says what stood before
        for head, (back, place_dD) in enumerate(places.items()):
            _look_back(first, head, back, common_D, theta, word_dD, place_dD)
        for number, attention in enumerate(attentions[1:-1]):
            tasks = _BETWEEN[number % len(_BETWEEN)][: attention.num_kv_heads]
            for head, task in _of_heads(attention, tasks):
                if isinstance(task, int):
                    _look_back(attention, head, task, common_D, theta, word_dD, word_dD)
                elif task is not None and task.after in places and task.before in (0, *places):
                    _find(attention, head, word_dD, places[task.after], places.get(task.before))
        if last is not first:
            for head, back in _of_heads(last, _LAST):
                _look_back(last, head, back, common_D, theta, word_dD, word_dD)


def _look_back(
    attention: Attention,
    head: int,
    back: int,
    common_D: torch.Tensor,
    theta: float,
    word_dD: torch.Tensor,
    place_dD: torch.Tensor,
) -> None:
    """Let query and key be the same at all positions, turned so that they meet ``back`` tokens apart."""
    d, dim = attention.head_dim, attention.q_proj.in_features
    kv_head = head * attention.num_kv_heads // attention.num_heads
    pairs = min(len(_FREQUENCIES), d // 2)
    sizes = torch.tensor(_FREQUENCIES[:pairs]).mul(d).sqrt()
    angles = theta ** -(2 * torch.arange(pairs) / d)
    # an input has length sqrt(dim), and this share of it is common
    scale = math.sqrt((1 + _COMMON**2) / dim) / _COMMON
    key_d, query_d = torch.zeros(d), torch.zeros(d)
    key_d[:pairs] = sizes
    query_d[:pairs] = sizes * torch.cos(back * angles)
    query_d[d // 2 : d // 2 + pairs] = -sizes * torch.sin(back * angles)
    _rows(attention.k_proj, kv_head, d).copy_(scale * key_d[:, None] * common_D + _noise(d, dim))
    _rows(attention.q_proj, head, d).copy_(scale * query_d[:, None] * common_D + _noise(d, dim))
    _rows(attention.v_proj, kv_head, d).copy_(word_dD)
    _columns(attention.o_proj, head, d).copy_(_LOUDNESS * place_dD.T)


def _find(
    attention: Attention, head: int, word_dD: torch.Tensor, after_dD: torch.Tensor, before_dD: torch.Tensor | None
) -> None:
    """Let the query be the word here, the key what stood a distance before; hand on what stood another one before.

    Only slow rotary frequencies take part: the others would compare distances as well.

    Args:
        attention: of a layer between.
        head: of its query heads.
        word_dD: the code of words.
        after_dD: where each position says what stood before it, at the distance to be found.
        before_dD: the same, at the distance to be handed on; None: the word at the position itself.
    """
    d, dim = attention.head_dim, attention.q_proj.in_features
    kv_head = head * attention.num_kv_heads // attention.num_heads
    slow = torch.arange(3 * d // 16, d // 2)
    rows = torch.cat([slow, slow + d // 2])
    mix_dd = torch.zeros(d, d)
    mix_dd[rows] = _orthonormal(len(rows), d)
    _rows(attention.k_proj, kv_head, d).copy_(mix_dd @ after_dD + _noise(d, dim))
    _rows(attention.q_proj, head, d).copy_(mix_dd @ word_dD + _noise(d, dim))
    _rows(attention.v_proj, kv_head, d).copy_(word_dD if before_dD is None else before_dD)
    _columns(attention.o_proj, head, d).copy_(_LOUDNESS * word_dD.T)


def _of_heads(attention: Attention, tasks: Sequence[Task]) -> Iterator[tuple[int, Task]]:
    """The first query head of each key/value head, and its task; other heads of a group stay as they are."""
    groups = attention.num_heads // attention.num_kv_heads
    return ((kv_head * groups, task) for kv_head, task in enumerate(tasks[: attention.num_kv_heads]))


def _rows(linear: nn.Linear, head: int, head_dim: int) -> torch.Tensor:
    """What leads into a head."""
    return linear.weight[head * head_dim : (head + 1) * head_dim]


def _columns(linear: nn.Linear, head: int, head_dim: int) -> torch.Tensor:
    """What leads out of a head."""
    return linear.weight[:, head * head_dim : (head + 1) * head_dim]


def _noise(rows: int, columns: int) -> torch.Tensor:
    return _NOISE * torch.randn(rows, columns) / math.sqrt(columns)


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Random rows of length 1, at right angles to each other."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T
