"""Many small pieces of work at once, such as reading recordings.

torch computes every operation with a team of threads, which on a few seconds of sound costs more than it gives. Here a
piece of work has one thread to itself, and the cores share the pieces.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_small(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``function`` of every item, in order; it must not depend on the caller's autocast or gradient mode."""
    items, pool = list(items), _pool()
    # a few pieces are handed over at once: what takes microseconds would take twice as long in handing over alone
    size = max(1, min(16, len(items) // (4 * torch.get_num_threads())))
    parts = (items[start : start + size] for start in range(0, len(items), size))
    done = pool.map(lambda part: [function(item) for item in part], parts)
    return [result for part in done for result in part]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # as many threads as torch may use; how many an operation takes is a property of the thread that calls it
    return ThreadPoolExecutor(torch.get_num_threads(), "small", initializer=_use_one_thread)


def _use_one_thread() -> None:
    torch.get_num_threads()  # the first question in a thread takes over what was set last anywhere: not after this
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
