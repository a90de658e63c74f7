"""Endless, shuffled, resumable batches.

The order of the data is a pure function of (seed, epoch, index) and so is every augmentation, so the whole state of a
stream is two integers: the epoch and the number of batches *used* in it. Batches that workers prepared ahead but the
loop did not use are simply prepared again, and the number of workers changes nothing. Neither does the number of ranks
(:mod:`omni.ranks`): a batch is the same rows, of which each rank prepares its share.

A sample that cannot be read ends the run with its place in the user's files, or is left out of its batch and counted,
as ``on_bad_sample`` says.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from omni import ranks
from omni.config import DataConfig, UserError
from omni.console import log
from omni.models.segments import Segments, Unpadded
from omni.parallel import map_small
from omni.processes import die_with_parent

_ALL_GOOD = DataConfig()  # a bad sample is an error
BatchType = TypeVar("BatchType", bound="Batch")


@dataclass
class Batch:
    """Tensors of one batch. ``counts`` says how many targets each loss term of it sums over, on all ranks together."""

    counts: dict[str, int]

    def to(self: BatchType, device: torch.device) -> BatchType:
        """The batch with every tensor on ``device``."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self: BatchType) -> BatchType:
        """The batch in memory that a GPU reads by itself, so that nobody waits for a copy; DataLoader asks for it."""
        return self._each(lambda value: value.pin_memory())

    def _each(self: BatchType, change: Callable[[Any], Any]) -> BatchType:
        changed: dict[str, Any] = {
            item.name: change(value)
            for item in dataclasses.fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor | Segments | Unpadded)
        }
        return dataclasses.replace(self, **changed)


class Samples(Protocol):
    """A data set as the stream sees it."""

    def __len__(self) -> int:
        """Number of samples."""

    def sample(self, index: int, rng: np.random.Generator | None) -> Any:
        """Sample ``index``; ``rng`` drives its augmentation, None means none. Raises UserError when it is unusable."""

    def where(self, index: int) -> str:
        """Where sample ``index`` stands in the user's files, as ``file:line``."""

    def collate(self, samples: list[Any]) -> Batch:
        """One batch from samples."""


@dataclass(frozen=True)
class Quota:
    """Samples ``first`` to ``end`` (exclusive), ``count`` of which an epoch has.

    Each comes as often as any other, give or take once; which come once more is drawn anew for each epoch.
    """

    first: int
    end: int
    count: int

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The indices of an epoch."""
        every = np.arange(self.first, self.end)
        return np.concatenate(
            [np.repeat(every, self.count // len(every)), rng.permutation(every)[: self.count % len(every)]]
        )


@dataclass(frozen=True)
class _Prepared:
    """A batch as it leaves a worker: its rows, the batch (None when no sample is usable), and what is unusable."""

    rows: list[int]
    batch: Any
    bad: dict[int, str]

    def pin_memory(self) -> _Prepared:
        """DataLoader pins what it knows, and what has this method."""
        return dataclasses.replace(self, batch=None if self.batch is None else self.batch.pin_memory())


class BatchStream:
    """Endless batches of ``samples``, shuffled anew each epoch.

    ``rules`` say what to do about a sample that cannot be used; ``left_out`` such have been left out already.
    With ``lengths``, batches are drawn from buckets of similar length, so that little of a batch is padding; with
    ``short_first`` as well, the first epoch goes from short to long (SortaGrad, Amodei et al., 2016), which helps CTC
    to find its first alignments. With ``quotas`` an epoch is not every sample once, but what they say.
    ``in_order``: the first epoch takes the samples as they stand, for such as build on one another.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        num_workers: int = 0,
        short_first: bool = False,
        rules: DataConfig = _ALL_GOOD,
        left_out: int = 0,
        quotas: Sequence[Quota] = (),
        in_order: bool = False,
    ) -> None:
        self.quotas = tuple(quotas)
        self.epoch_size = sum(quota.count for quota in quotas) if quotas else len(samples)
        if self.epoch_size == 0:
            raise UserError("no sample is left to train on, expected at least one")
        self.samples = samples
        self.batch_size = min(batch_size, self.epoch_size)
        if self.batch_size < ranks.size():
            raise UserError(
                f"batch_size: found {self.batch_size} (of {self.epoch_size} samples), expected at least one sample for "
                f"each of the {ranks.size()} ranks"
            )
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.num_workers = num_workers
        self.short_first, self.in_order = short_first, in_order
        self.rules, self.left_out = rules, left_out
        self.epoch = 0
        self.used = 0  # batches of this epoch
        self.rows: list[int] = []  # indices of the samples in the batch last returned, those of all ranks
        self.bad: set[str] = set()  # where the samples stand that were found unusable so far
        self._batches: Iterator[_Prepared] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in an epoch; the few samples left over come in another epoch's order."""
        return self.epoch_size // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while True:
            if self._batches is None:
                self._batches = self._start()
            prepared = _shared(_handed_over(self._batches))
            self._judge(prepared.bad)
            self.rows = prepared.rows
            self.used += 1
            if self.used == self.batches_per_epoch:
                self.epoch, self.used = self.epoch + 1, 0
            if prepared.batch is not None:
                return prepared.batch

    def _judge(self, bad: dict[int, str]) -> None:
        """Remember unusable samples, or refuse them.

        Raises:
            UserError: for the first, or when they are more than ``max_bad_fraction`` of all samples, or all.
        """
        if not bad:
            return
        for index, why in bad.items():
            if self.rules.on_bad_sample == "error":
                raise UserError(f"{self.where(index)}: {why}; --on_bad_sample skip leaves such samples out")
            if self.where(index) not in self.bad:
                log.warning("%s: left out: %s", self.where(index), why)
                self.bad.add(self.where(index))
        most = self.rules.max_bad_fraction
        if len(self.bad) > most * len(self.samples) or len(self.bad) == len(self.samples):
            raise UserError(
                f"{len(self.bad)} of {len(self.samples)} samples cannot be used, the last {self.where(max(bad))}; "
                f"expected at most a share of {most:g} (max_bad_fraction), and one that can"
            )

    @property
    def num_bad(self) -> int:
        """Samples that could not be used: those left out before the stream began, and those found in it."""
        return self.left_out + len(self.bad)

    def where(self, index: int) -> str:
        """Where a sample stands in the user's files."""
        return self.samples.where(index)

    def state_dict(self) -> dict[str, Any]:
        """The position, two integers, and the samples found unusable on the way there."""
        return {"epoch": self.epoch, "used": self.used, "bad": sorted(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; nothing is read to get there."""
        self.close()
        self.epoch, self.used = state["epoch"], state["used"] % self.batches_per_epoch
        self.bad = set(state["bad"])

    def close(self) -> None:
        """End the processes that prepare batches, if there are any."""
        batches, self._batches = self._batches, None
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            # not left to the collector: an error that is on its way up still refers to it
            batches._shutdown_workers()
            for worker in batches._workers:
                if worker.is_alive():  # one that was killed may have taken along what another waits for
                    worker.kill()

    def order(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch as lists of indices."""
        rng = np.random.default_rng((self.seed, epoch))
        number = self.batches_per_epoch * self.batch_size
        if self.in_order and epoch == 0:
            return [batch.tolist() for batch in np.arange(number).reshape(-1, self.batch_size)]
        if self.quotas:
            drawn = np.concatenate([quota.draw(rng) for quota in self.quotas])
            indices = drawn[rng.permutation(len(drawn))]
        else:
            indices = rng.permutation(len(self.samples))
        if self.lengths is not None:
            # sort inside windows of 50 batches: lengths are alike within a batch, the order stays random overall
            window = 50 * self.batch_size
            indices = np.concatenate(
                [
                    part[np.argsort(self.lengths[part], kind="stable")]
                    for part in np.split(indices, range(window, len(indices), window))
                ]
            )
        whole = indices[:number].reshape(-1, self.batch_size)
        shuffled = [batch.tolist() for batch in whole[rng.permutation(len(whole))]]
        if self.short_first and epoch == 0 and self.lengths is not None:
            lengths = self.lengths
            shuffled.sort(key=lambda batch: int(lengths[batch].max()))
        return shuffled

    def _plan(self) -> Iterator[list[tuple[int, int]]]:
        epoch, used = self.epoch, self.used
        while True:
            for batch in self.order(epoch)[used:]:
                yield [(epoch, index) for index in ranks.share(batch)]
            epoch, used = epoch + 1, 0

    def _start(self) -> Iterator[_Prepared]:
        if self.num_workers == 0:
            here = (self._prepare(map_small(self.__getitem__, keys)) for keys in self._plan())
            # a copy from other memory would wait until the GPU has done all before it
            return (prepared.pin_memory() for prepared in here) if torch.cuda.is_available() else here
        loader: DataLoader[Any] = DataLoader(
            self,  # type: ignore[arg-type]  # a map from (epoch, index) to a sample
            batch_sampler=_Sampler(self._plan()),
            collate_fn=self._prepare,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it draws from the numbers that dropout is made of
            # samples need not be picklable: a forked worker has them already
            multiprocessing_context="fork" if "fork" in multiprocessing.get_all_start_methods() else None,
        )
        return iter(loader)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        epoch, index = key
        return index, _sample(self.samples, index, np.random.default_rng((self.seed, 1, epoch, index)))

    def _prepare(self, keyed: list[tuple[int, Any]]) -> _Prepared:
        bad = {index: str(sample) for index, sample in keyed if isinstance(sample, UserError)}
        good = [sample for index, sample in keyed if index not in bad]
        return _Prepared([index for index, _ in keyed], self.samples.collate(good) if good else None, bad)


def _handed_over(batches: Iterator[_Prepared]) -> _Prepared:
    """The next batch.

    Raises:
        RuntimeError: in torch's words, if a worker ended while it handed its batch over: the connection then breaks
            (or was never made), mostly before torch has noticed the end of the process.
    """
    try:
        return next(batches)
    except (OSError, EOFError):
        workers = batches._workers if isinstance(batches, _MultiProcessingDataLoaderIter) else []
        ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
        for worker in workers:
            if worker.sentinel in ended:
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) ended while it handed over a batch") from None
        raise


def _shared(own: _Prepared) -> _Prepared:
    """A rank's share of a batch, with the rows, the target counts and the unusable samples of the whole batch.

    Where a rank has not one usable sample the batch is passed over by all.
    """
    if ranks.size() == 1:
        return own
    said = ranks.gather("a batch", (own.rows, own.bad, own.batch and own.batch.counts))
    bad = {index: why for _, theirs, _ in said for index, why in theirs.items()}
    rows = ranks.merged([rows for rows, _, _ in said])
    counts = [theirs for *_, theirs in said]
    if None in counts:
        return _Prepared(rows, None, bad)
    own.batch.counts = {term: sum(theirs[term] for theirs in counts) for term in own.batch.counts}
    return _Prepared(rows, own.batch, bad)


def _sample(samples: Samples, index: int, rng: np.random.Generator | None) -> Any:
    """A sample, or the error that says why it is unusable: raised in a worker process it would lose its type."""
    try:
        return samples.sample(index, rng)
    except UserError as error:
        return error


def _begin_worker(number: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a group; the training process alone decides what they mean."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(1800))  # by then it has finished its step and saved
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    die_with_parent()


class _Sampler:
    """The plan as an object that DataLoader accepts as a batch sampler."""

    def __init__(self, plan: Iterator[list[tuple[int, int]]]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.plan


def ordered_batches(
    samples: Samples,
    batch_size: int,
    limit: int | None = None,
    lengths: Sequence[int] | None = None,
    rules: DataConfig = _ALL_GOOD,
) -> Iterator[Any]:
    """Each sample once, without augmentation, for evaluation; at most ``limit`` batches.

    With ``lengths`` they come sorted by length, which wastes less of a batch on padding.

    Raises:
        UserError: for an unusable sample, unless ``rules`` say that such are left out.
    """
    indices = list(range(len(samples)))
    if lengths is not None:
        indices.sort(key=lambda index: lengths[index])
    starts = range(0, len(indices), batch_size)
    for start in list(starts)[:limit]:
        rows = indices[start : start + batch_size]
        found = map_small(lambda index: _sample(samples, index, None), rows)
        bad = {index: item for index, item in zip(rows, found, strict=True) if isinstance(item, UserError)}
        if bad and rules.on_bad_sample == "error":
            raise UserError("\n".join(f"{samples.where(index)}: {why}" for index, why in bad.items()))
        good = [item for index, item in zip(rows, found, strict=True) if index not in bad]
        if good:
            yield samples.collate(good)


def pad_to(size: int, multiple: int) -> int:
    """The next multiple: few distinct shapes, so that the CPU's matmul library reuses its plans."""
    return -(-size // multiple) * multiple
