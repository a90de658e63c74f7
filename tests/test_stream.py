"""The stream of batches: shuffled, endless, and its position is two integers."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory as pin_by_data_loader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from omni.data.stream import Batch, BatchStream, _Prepared, ordered_batches, pad_to
from omni.models.segments import Unpadded, unpadded
from omni.parallel import map_small


@dataclass
class Numbers(Batch):
    x: torch.Tensor


@dataclass
class Captions(Numbers):
    words: Unpadded


class Samples:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, rng: np.random.Generator | None) -> Any:
        return index + (0 if rng is None else float(rng.random()) / 2)

    def where(self, index: int) -> str:
        return f"numbers.txt:{index + 1}"

    def collate(self, samples: list[Any]) -> Numbers:
        return Numbers({"items": len(samples)}, torch.tensor(samples))


def take(stream: BatchStream, count: int) -> list[list[float]]:
    return [next(stream).x.tolist() for _ in range(count)]  # type: ignore[attr-defined]


def test_lessons_come_in_their_order_once() -> None:
    stream = BatchStream(Samples(23), 4, 5, in_order=True)
    first = [[int(number) for number in batch] for batch in take(stream, 5)]
    assert first == [list(range(start, start + 4)) for start in range(0, 20, 4)]
    assert stream.epoch == 1 and stream.order(1) == BatchStream(Samples(23), 4, 5).order(1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lengths", [None, [(7 * i) % 23 for i in range(23)]])
def test_resume_continues_where_it_stopped(lengths: list[int] | None, workers: int) -> None:
    whole = take(BatchStream(Samples(23), 4, 5, lengths), 17)  # more than three epochs of five batches
    for cut in (0, 1, 5, 7, 12):
        first = BatchStream(Samples(23), 4, 5, lengths, workers)
        assert take(first, cut) == whole[:cut]
        again = BatchStream(Samples(23), 4, 5, lengths, workers)
        again.load_state_dict(first.state_dict())
        assert take(again, 17 - cut) == whole[cut:]
        first.close()
        again.close()
        if workers:
            break  # one position is enough with processes


def test_position_is_two_integers_and_does_not_grow() -> None:
    stream = BatchStream(Samples(23), 4, 5)
    take(stream, 1003)
    assert stream.state_dict() == {"epoch": 200, "used": 3, "bad": []}


def test_every_epoch_has_another_order_and_every_sample_at_most_once() -> None:
    stream = BatchStream(Samples(24), 4, 1)
    first, second = ([index for batch in stream.order(epoch) for index in batch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert BatchStream(Samples(24), 4, 2).order(0) != stream.order(0)


def test_augmentation_differs_between_epochs_but_not_between_runs() -> None:
    a, b = take(BatchStream(Samples(4), 4, 1), 2)
    assert sorted(map(int, a)) == sorted(map(int, b)) == [0, 1, 2, 3]
    assert sorted(a) != sorted(b)
    assert take(BatchStream(Samples(4), 4, 1), 2) == [a, b]


def test_batches_hold_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 800).tolist()

    def spread(stream: BatchStream) -> float:
        return float(np.mean([np.ptp([lengths[i] for i in batch]) for batch in stream.order(0)]))

    assert spread(BatchStream(Samples(800), 8, 0, lengths)) < 0.1 * spread(BatchStream(Samples(800), 8, 0))


def test_fewer_samples_than_a_batch() -> None:
    assert len(take(BatchStream(Samples(3), 8, 0), 2)[1]) == 3


def test_rows_say_which_samples_a_batch_held() -> None:
    stream = BatchStream(Samples(9), 3, 0)
    for _ in range(7):
        batch = next(stream)
        assert [int(x) for x in batch.x] == stream.rows  # type: ignore[attr-defined]


def test_evaluation_sees_each_sample_once_and_not_augmented() -> None:
    batches = list(ordered_batches(Samples(7), 3))
    assert [batch.x.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    by_length = ordered_batches(Samples(4), 2, None, [4, 3, 2, 1])
    assert [batch.x.tolist() for batch in by_length] == [[3, 2], [1, 0]]
    assert len(list(ordered_batches(Samples(7), 3, 2))) == 2


def test_pad_to() -> None:
    assert [pad_to(size, 16) for size in (1, 16, 17)] == [16, 16, 32]


def test_small_pieces_of_work_keep_their_order_and_leave_the_threads_of_the_caller() -> None:
    before = torch.get_num_threads()
    found = map_small(lambda number: (2 * number, torch.get_num_threads()), range(50))
    assert found == [(2 * number, 1) for number in range(50)]
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        map_small(lambda number: 1 // number, [1, 0])


def test_every_tensor_of_a_batch_is_pinned_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and by DataLoader's own function for what workers prepared; pinning itself needs a GPU."""
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = unpadded(torch.tensor([[True, False], [True, True]]), multiple=1)
    batch = Captions({"items": 2}, torch.arange(3), words)
    segments = words.segments
    parts = [batch.x, words.places_N, segments.numbers_N, segments.places_M, segments.padding_P, segments.back_N]
    masks = [group.mask for group in segments.groups if group.mask is not None]
    assert masks  # a row of one position beside one of two
    from_worker = pin_by_data_loader(_Prepared([0, 1], batch, {}))
    assert sorted(pinned) == sorted(part.data_ptr() for part in [*parts, *masks])
    assert from_worker.batch is not batch and torch.equal(from_worker.batch.x, batch.x)
    pinned.clear()
    next(BatchStream(Samples(4), 2, seed=0))
    assert len(pinned) == 1
    assert pin_by_data_loader(_Prepared([0], None, {})).batch is None


def test_a_worker_that_ends_while_it_hands_over_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BatchStream(Samples(40), 4, seed=1, num_workers=1)
    next(stream)
    workers = stream._batches._workers  # type: ignore[union-attr]

    def broken(batches: Any) -> Any:
        os.kill(workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")  # what the trainer's end of the line then says

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "__next__", broken)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        next(stream)
    stream.close()


def test_a_sample_that_breaks_a_connection_is_no_lost_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BatchStream(Samples(40), 4, seed=1)
    monkeypatch.setattr(Samples, "sample", lambda *_: (_ for _ in ()).throw(ConnectionResetError(104, "reset")))
    with pytest.raises(ConnectionResetError):
        next(stream)
