"""One thread runs the model; requests wait for it in order. A request whose client has left is dropped."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch

from omni.config import UserError
from omni.server.errors import ApiError, server_error

Emit = Callable[[Any], None]


class ClientLeftError(Exception):
    """Nobody waits for this answer any more."""


class Job:
    """What one request wants of the model.

    Args:
        work: runs in the worker's thread; what it hands to its argument arrives at :meth:`events`, in order. That call
            raises ClientLeftError once the client has left, and so ends the work.
    """

    def __init__(self, work: Callable[[Emit], None]) -> None:
        self._work, self._loop = work, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._left = threading.Event()

    def leave(self) -> None:
        """The client has left, or has all it wanted. To be called in the event loop."""
        self._left.set()
        self._events.put_nowait(("left", None))

    async def events(self) -> AsyncIterator[Any]:
        """What the work hands out, until it is done. Raises ApiError where it fails, ClientLeftError after leaving."""
        while True:
            kind, value = await self._events.get()
            if kind == "done":
                return
            if kind == "failed":
                raise value
            if kind == "left":
                raise ClientLeftError
            yield value

    def run(self) -> None:
        """Do the work; called by the worker."""
        if self._left.is_set():
            return
        try:
            self._work(self._emit)
        except ClientLeftError:
            return
        except ApiError as error:
            self._put("failed", error)
        except UserError as error:
            self._put("failed", ApiError(400, str(error)))
        except Exception as error:
            self._put("failed", server_error(error))
        else:
            self._put("done", None)

    def _emit(self, value: Any) -> None:
        if self._left.is_set():
            raise ClientLeftError
        self._put("event", value)

    def _put(self, kind: str, value: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))
        except RuntimeError:  # the server is shutting down
            raise ClientLeftError from None


class Worker:
    """The thread that runs the model, and the queue before it.

    Args:
        queue_size: requests that may wait besides the one that is worked on.
    """

    def __init__(self, queue_size: int) -> None:
        self.queue_size = queue_size
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._admitted = 0
        self._seconds = 1.0  # what a request took, lately
        self._thread = threading.Thread(target=self._run, name="omni-model", daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        """Requests inside."""
        return self._admitted

    def enter(self) -> None:
        """Take a place, before anything of a request is read. To be called in the event loop.

        Raises:
            ApiError: 429, with when to try again, where there is none.
        """
        if self._admitted > self.queue_size:
            seconds = min(60, max(1, round(self._seconds * self.queue_size / 2)))
            message = f"{self._admitted} requests are waiting, which is the most; try again in {seconds} s"
            raise ApiError(429, message, code="queue_full", retry_after=seconds)
        self._admitted += 1

    def leave(self) -> None:
        """Give the place back."""
        self._admitted -= 1

    def submit(self, work: Callable[[Emit], None]) -> Job:
        """Put work behind all that waits."""
        job = Job(work)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        """End the thread after the work at hand."""
        self._jobs.put(None)

    def _run(self) -> None:
        torch.set_flush_denormal(True)  # a setting of each thread: see omni.runtime.setup_compute
        while (job := self._jobs.get()) is not None:
            started = time.perf_counter()
            job.run()
            self._seconds += 0.2 * (time.perf_counter() - started - self._seconds)
            del job  # nothing of a request outlives it
