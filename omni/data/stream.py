"""Endless, shuffled, resumable batches.

The order of the data is a pure function of (seed, epoch, index) and so is every augmentation, so the whole state of a
stream is two integers: the epoch and the number of batches *used* in it. Batches that workers prepared ahead but the
loop did not use are simply prepared again, and the number of workers changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from omni.parallel import map_small

BatchType = TypeVar("BatchType", bound="Batch")


@dataclass
class Batch:
    """Tensors of one batch. ``counts`` says how many targets each loss term of it sums over."""

    counts: dict[str, int]

    def to(self: BatchType, device: torch.device) -> BatchType:
        """The batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            item.name: value.to(device, non_blocking=True)
            for item in dataclasses.fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


class Samples(Protocol):
    """A data set as the stream sees it."""

    def __len__(self) -> int:
        """Number of samples."""

    def sample(self, index: int, rng: np.random.Generator | None) -> Any:
        """Sample ``index``; ``rng`` drives its augmentation, None means none."""

    def collate(self, samples: list[Any]) -> Batch:
        """One batch from samples."""


class BatchStream:
    """Endless batches of ``samples``, shuffled anew each epoch.

    With ``lengths``, batches are drawn from buckets of similar length, so that little of a batch is padding; with
    ``short_first`` as well, the first epoch goes from short to long (SortaGrad, Amodei et al., 2016), which helps CTC
    to find its first alignments.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        num_workers: int = 0,
        short_first: bool = False,
    ) -> None:
        assert len(samples) > 0, "a data set without samples must be refused where it is read"
        self.samples = samples
        self.batch_size = min(batch_size, len(samples))
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.num_workers = num_workers
        self.short_first = short_first
        self.epoch = 0
        self.used = 0  # batches of this epoch
        self.rows: list[int] = []  # indices of the samples in the batch last returned
        self._batches: Iterator[tuple[list[int], Batch]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in an epoch; the few samples left over come in another epoch's order."""
        return len(self.samples) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        self.rows, batch = next(self._batches)
        self.used += 1
        if self.used == self.batches_per_epoch:
            self.epoch, self.used = self.epoch + 1, 0
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position: two integers."""
        return {"epoch": self.epoch, "used": self.used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; nothing is read to get there."""
        self.epoch, self.used = state["epoch"], state["used"] % self.batches_per_epoch
        self._batches = None

    def order(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch as lists of indices."""
        rng = np.random.default_rng((self.seed, epoch))
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
        whole = indices[: self.batches_per_epoch * self.batch_size].reshape(-1, self.batch_size)
        shuffled = [batch.tolist() for batch in whole[rng.permutation(len(whole))]]
        if self.short_first and epoch == 0 and self.lengths is not None:
            lengths = self.lengths
            shuffled.sort(key=lambda batch: int(lengths[batch].max()))
        return shuffled

    def _plan(self) -> Iterator[list[tuple[int, int]]]:
        epoch, used = self.epoch, self.used
        while True:
            for batch in self.order(epoch)[used:]:
                yield [(epoch, index) for index in batch]
            epoch, used = epoch + 1, 0

    def _start(self) -> Iterator[tuple[list[int], Batch]]:
        if self.num_workers == 0:
            return (self._prepare(map_small(self.__getitem__, keys)) for keys in self._plan())
        loader: DataLoader[Any] = DataLoader(
            self,  # type: ignore[arg-type]  # a map from (epoch, index) to a sample
            batch_sampler=_Sampler(self._plan()),
            collate_fn=self._prepare,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        epoch, index = key
        return index, self.samples.sample(index, np.random.default_rng((self.seed, 1, epoch, index)))

    def _prepare(self, keyed: list[tuple[int, Any]]) -> tuple[list[int], Batch]:
        return [index for index, _ in keyed], self.samples.collate([sample for _, sample in keyed])


class _Sampler:
    """The plan as an object that DataLoader accepts as a batch sampler."""

    def __init__(self, plan: Iterator[list[tuple[int, int]]]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.plan


def ordered_batches(
    samples: Samples, batch_size: int, limit: int | None = None, lengths: Sequence[int] | None = None
) -> Iterator[Any]:
    """Each sample once, without augmentation, for evaluation; at most ``limit`` batches.

    With ``lengths`` they come sorted by length, which wastes less of a batch on padding.
    """
    indices = list(range(len(samples)))
    if lengths is not None:
        indices.sort(key=lambda index: lengths[index])
    starts = range(0, len(indices), batch_size)
    for start in list(starts)[:limit]:
        yield samples.collate(map_small(lambda index: samples.sample(index, None), indices[start : start + batch_size]))


def pad_to(size: int, multiple: int) -> int:
    """The next multiple: few distinct shapes, so that the CPU's matmul library reuses its plans."""
    return -(-size // multiple) * multiple
