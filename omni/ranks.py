"""Several processes that train one model, as ``torchrun`` starts them: who is who, and what they tell each other.

A rank is one of these processes; it computes its share of the rows of every batch: row i belongs to rank ``i % size``.
Losses and gradients are sums over targets that are divided by the counts of the whole batch, so what the ranks found
only has to be added up. For one process everything here is the identity, and no process group exists.

**Gradients** are added up in buckets after the last micro-batch (:func:`add_up`) and not by DistributedDataParallel.
That one hooks into one module's ``forward`` and averages; here a phase trains several modules through methods of their
own, leaves parts frozen or, for a batch of text alone, without a gradient, and a rank that finds NaN must be able to
leave a step that the others are in the middle of. Two ranks on two busy CPU cores, 0.92 M parameters: a step took
136 ms of CPU time a rank, with DistributedDataParallel 156 (docs/scaling.md).

**A rank that stops in the middle of a step** (NaN in a forward pass) must not leave the others waiting. So every
exchange is preceded by what the sender is doing, and who hears that another one has ended the step ends it as well.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from omni.config import UserError

Item = TypeVar("Item")
_BUCKET_BYTES = 25 * 2**20  # of gradients that are sent at once, as DistributedDataParallel's
_STEP = "the end of a step"  # the exchange that a rank may come to before the others
_ELSEWHERE = "another rank has ended the step"


class LostRankError(UserError):
    """Another rank has gone, or does not answer."""


@dataclass(frozen=True)
class _Team:
    """This process's place among the others, and the group for what is said on the CPU."""

    rank: int
    size: int
    voice: Any
    timeout: float


_team: _Team | None = None
_num_groups = 0  # that this process has been in


# ---- who is who ----


def launched() -> bool:
    """Whether ``torchrun`` (or what sets the same variables) started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local() -> tuple[int, int]:
    """This process's number on its machine, and how many there are on it; ``(0, 1)`` for one process."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) if launched() else (0, 1)


def rank() -> int:
    """This process's number: 0 writes and speaks."""
    return _team.rank if _team else 0


def size() -> int:
    """How many processes train together."""
    return _team.size if _team else 1


def one_voice(main: Callable[[], int | None]) -> Callable[[], int | None]:
    """``main`` as a rank runs it: the first one to fail says why, and nobody else says anything but rank 0."""

    def spoken() -> int | None:
        if not launched():
            return main()
        with contextlib.ExitStack() as stack:
            if os.environ["RANK"] != "0":
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))  # noqa: PTH123
            try:
                return main()
            except (Exception, KeyboardInterrupt) as error:
                if _first_to_fail():
                    raise
                code = error.exit_code if isinstance(error, UserError) else 1
                raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else code) from None

    return spoken


def _first_to_fail() -> bool:
    """Whether no other rank has failed before; asked of torchrun itself, which outlives every rank."""
    try:
        return _store(60).add("failed", 1) == 1
    except RuntimeError:  # nobody is left to ask
        return True


def _store(seconds: float) -> Any:
    """torchrun's own table of keys and values, the part that belongs to this attempt and its how-manieth group."""
    from torch.distributed import PrefixStore, rendezvous

    store = next(rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))[0]
    # torchrun's attempts share the table, and groups that follow one another in a process would find old addresses
    return PrefixStore(f"omni/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{_num_groups}", store)


@contextlib.contextmanager
def together(device: torch.device, timeout: float) -> Iterator[None]:
    """Train with the other ranks inside of the block; without effect for one process.

    Args:
        device: where this rank computes: gradients go by NCCL between CUDA devices, by gloo between CPUs.
        timeout: seconds that a rank waits for another one before it gives up.

    Raises:
        UserError: when not all ranks come.
    """
    global _team, _num_groups
    if not launched():
        yield
        return
    import torch.distributed as dist

    patience = datetime.timedelta(seconds=timeout)
    number, many = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=_store(timeout), rank=number, world_size=many, timeout=patience)
        voice = dist.new_group(backend="gloo", timeout=patience) if device.type == "cuda" else None
    except RuntimeError as error:
        raise UserError(
            f"the ranks did not find each other within {timeout:g} s ({str(error).splitlines()[0][:200]}); "
            "docs/scaling.md says which network settings torchrun needs"
        ) from None
    _team = _Team(number, many, voice, timeout)
    try:
        yield
        gather("the end", None)  # torchrun ends all as soon as one has gone too early
        dist.destroy_process_group()
        _num_groups += 1
    finally:
        _team = None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """As if there were no other rank: for what rank 0 does while the others wait."""
    global _team
    kept, _team = _team, None
    try:
        yield
    finally:
        _team = kept


# ---- what they tell each other ----


def gather(doing: str, value: Item) -> list[Item]:
    """``value`` of every rank, in their order; each must come here, and be ``doing`` the same.

    Raises:
        FloatingPointError: when another one has ended the step that this one is in, because of NaN.
        LostRankError: when another one has gone.
    """
    if _team is None:
        return [value]
    import torch.distributed as dist

    said: list[Any] = [None] * _team.size
    while True:
        with _others_may_be_gone():
            dist.all_gather_object(said, (doing, value), group=_team.voice)
        if all(theirs == doing for theirs, _ in said):
            return [value for _, value in said]
        assert any(theirs == _STEP for theirs, _ in said), f"the ranks are out of step: {[what for what, _ in said]}"
        if doing != _STEP:
            raise FloatingPointError(_ELSEWHERE)
        # the others have heard it, and come to the end of the step now


@contextlib.contextmanager
def _others_may_be_gone() -> Iterator[None]:
    assert _team is not None
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"rank {_team.rank} has lost another rank, which was killed (perhaps for want of memory) or did not answer "
            f"within {_team.timeout:g} s (rank_timeout): {str(error).splitlines()[0][:150]}. The same command continues"
        ) from None


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Rank 0 runs the block before the others do, so that they find on the disk what it has made."""
    if rank() > 0:
        gather("what rank 0 makes", None)
    try:
        yield
    except Exception:  # the others will come to the same
        if rank() == 0:
            gather("what rank 0 makes", None)
        raise
    if rank() == 0:
        gather("what rank 0 makes", None)


def by_first(function: Callable[[], Item]) -> Item:
    """What ``function`` gives on rank 0, which alone runs it, as if it were alone; every rank gets the result."""
    if _team is None:
        return function()
    result: Any = None
    if _team.rank == 0:
        with alone():
            result = function()
    return gather("what rank 0 found", result)[0]


# ---- the rows of a batch ----


def share(rows: Sequence[Item]) -> list[Item]:
    """This rank's rows of a batch."""
    return list(rows[rank() :: size()])


def merged(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """The rows of a batch in their order, from the shares of all ranks."""
    places = [(row, number) for number, rows in enumerate(shares) for row in range(len(rows))]
    return [shares[number][row] for row, number in sorted(places)]


def rows_before(limit: int, num_rows: int) -> int:
    """How many of this rank's ``num_rows`` rows are among the first ``limit`` of the batch."""
    return min(num_rows, max(0, -(-(limit - rank()) // size())))


class _WholeBatch(torch.autograd.Function):
    """Rows of all ranks; backward adds up what the ranks' losses say about each row, and gives back one's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        sizes = gather("the rows of a batch", len(x))
        order = merged([[(number, row) for row in range(many)] for number, many in enumerate(sizes)])
        ctx.mine = torch.tensor([at for at, (number, _) in enumerate(order) if number == rank()], device=x.device)
        # a sum with zeros: exact, and shares may differ in size
        whole = x.new_zeros(len(order), *x.shape[1:])
        whole[ctx.mine] = x
        return _summed(whole)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        gather("the gradient of the rows of a batch", None)
        return _summed(grads[0].clone(memory_format=torch.contiguous_format))[ctx.mine]


def whole_batch(x: torch.Tensor) -> torch.Tensor:
    """Rows [B, ...] of all ranks in the order of the batch, from this rank's [b, ...]; gradients find their way back.

    Each rank must use it in the same way, and its loss must be its own share of the sum over ranks. The dimensions
    behind the first one must be the same on all ranks.
    """
    if _team is None:
        return x
    if x.dtype == torch.bool:  # which gloo cannot add
        return whole_batch(x.to(torch.uint8)).bool()
    whole: torch.Tensor = _WholeBatch.apply(x)
    return whole


def _summed(x: torch.Tensor) -> torch.Tensor:
    """``x`` with what the other ranks have there added."""
    import torch.distributed as dist

    if x.numel():
        with _others_may_be_gone():
            dist.all_reduce(x)
    return x


# ---- weights and gradients ----


@torch.no_grad()
def from_first(*tensors: torch.Tensor) -> None:
    """Overwrite tensors with those of rank 0."""
    if _team is None:
        return
    import torch.distributed as dist

    gather("the tensors of rank 0", None)
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        with _others_may_be_gone():
            dist.broadcast(sent.view(torch.uint8) if sent.dtype == torch.bool else sent, 0)
        tensor.copy_(sent)


def same_weights(model: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers."""
    from_first(*model.state_dict(keep_vars=True).values())


@dataclass(frozen=True)
class StepSum:
    """A step over all ranks: its loss, why it must be skipped, if it must, and a signal that a rank has got."""

    loss: float
    problem: str | None
    signal: int | None


def add_up(loss: float, problem: str | None, signal: int | None, parameters: Sequence[nn.Parameter]) -> StepSum:
    """Add up loss and gradients over the ranks, unless one of them has a problem.

    A parameter that has a gradient on some ranks only gets their sum; on none, it stays without.
    """
    if _team is None:
        return StepSum(loss, problem, signal)
    given = [parameter.grad is not None for parameter in parameters]
    said = gather(_STEP, (loss, problem, signal, given))
    signal = next((theirs for _, _, theirs, _ in said if theirs is not None), None)
    problems = [f"rank {number}: {why}" for number, (_, why, *_) in enumerate(said) if why not in (None, _ELSEWHERE)]
    if problems:
        return StepSum(float("nan"), problems[0], signal)
    anywhere = [any(flags) for flags in zip(*(flags for *_, flags in said), strict=True)]
    gradients = []
    for parameter, wanted in zip(parameters, anywhere, strict=True):
        if wanted:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    sum_gradients(gradients)
    return StepSum(sum(loss for loss, *_ in said), None, signal)


def sum_gradients(gradients: Sequence[torch.Tensor]) -> None:
    """Add up tensors over the ranks in place, a few large pieces instead of many small ones."""
    import torch.distributed as dist

    with _others_may_be_gone():
        sent = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in sent:
            work.wait()
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one type in groups of about ``_BUCKET_BYTES``."""
    for kind in {tensor.dtype: None for tensor in tensors}:
        bucket: list[torch.Tensor] = []
        for tensor in tensors:
            if tensor.dtype != kind:
                continue
            bucket.append(tensor)
            if sum(item.nbytes for item in bucket) >= _BUCKET_BYTES:
                yield bucket
                bucket = []
        if bucket:
            yield bucket
