"""A toy stage for the tests of the loop: two phases, dropout, augmentation, unequal target counts. Also a script."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from omni import ranks
from omni.config import DataConfig, PhaseConfig, StageConfig, UserError
from omni.data.stream import Batch, BatchStream
from omni.runtime import Precision
from omni.training_utils import Run, Stage, run_stage


@dataclass(frozen=True, kw_only=True)
class ToyConfig(StageConfig):
    """Configuration of the toy."""

    first: PhaseConfig
    second: PhaseConfig
    width: int = 8
    dropout: float = 0.2
    data_name: str = "a"
    sleep: float = 0.0
    poison: tuple[int, ...] = ()  # calls of the loss that give NaN
    idle: tuple[int, ...] = ()  # calls of the loss in which nothing that is trained takes part
    val_noise: bool = True
    burst: str = ""  # a module whose output, or whose gradient ("... backward"), becomes NaN in the second step
    data: DataConfig = field(default_factory=DataConfig)
    bad_rows: tuple[int, ...] = ()  # rows that cannot be read
    broken_batch: bool = False  # making a batch fails, by a mistake in the code
    lame: int = -1  # the rank on which poison and what follows happens; -1: on all
    stumble: tuple[int, ...] = ()  # calls of the loss that find NaN before the ranks compare their rows
    trip: tuple[int, ...] = ()  # ... and after they have
    blunder: tuple[int, ...] = ()  # calls of the loss that fail, by a mistake in the code
    spread: float = 0.0  # weight of the distance between a row's prediction and the mean over the rows of all ranks


@dataclass
class Points(Batch):
    """Rows of inputs and targets; ``valid_BT`` says which count."""

    x_BTD: torch.Tensor
    y_BT: torch.Tensor
    valid_BT: torch.Tensor


class Data:
    """Noisy lines; row i has 1 + i % 5 targets."""

    def __init__(self, bad_rows: tuple[int, ...] = (), broken_batch: bool = False) -> None:
        self.bad_rows, self.broken_batch = bad_rows, broken_batch
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(37, 5, 4)).astype(np.float32)
        self.y = self.x.sum(-1)

    def __len__(self) -> int:
        return len(self.x)

    def sample(self, index: int, rng: np.random.Generator | None) -> Any:
        if index in self.bad_rows:
            raise UserError("truncated, expected a whole row")
        noise = 0 if rng is None else rng.normal(scale=0.05, size=self.x[index].shape).astype(np.float32)
        return self.x[index] + noise, self.y[index], np.arange(5) <= index % 5

    def where(self, index: int) -> str:
        return f"toy.csv:{index + 2}"

    def collate(self, samples: list[Any]) -> Points:
        if self.broken_batch:
            raise RuntimeError("a mistake of ours")
        x, y, valid = (torch.from_numpy(np.stack(column)) for column in zip(*samples, strict=True))
        return Points({"points": int(valid.sum())}, x, y, valid)


class Toy(nn.Module):
    """Two small parts, one a phase."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout))
        self.outer = nn.Linear(width, 1)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.outer(self.layers(x_BTD)).squeeze(-1)


def error_sum(model: Toy, batch: Points) -> torch.Tensor:
    return ((model(batch.x_BTD) - batch.y_BT).square() * batch.valid_BT).sum()


def spoil(call: int, backward: bool, output: torch.Tensor) -> torch.Tensor:
    """NaN in the third and fourth call of the loss: the second step, with two micro-batches a step."""
    if call not in (3, 4):
        return output
    if not backward:
        return output * float("nan")
    output.register_hook(lambda gradient: gradient * float("nan"))
    return output


def build(config: ToyConfig, precision: Precision) -> Run:
    """The toy and its two phases."""
    model = Toy(config.width, config.dropout)
    calls = [0]
    if config.burst:
        name, _, backward = config.burst.partition(" ")
        model.get_submodule(name).register_forward_hook(lambda *hooked: spoil(calls[0], bool(backward), hooked[2]))

    def loss(model: Toy, batch: Points) -> dict[str, torch.Tensor]:
        calls[0] += 1
        if config.sleep:
            import time

            time.sleep(config.sleep)
        here = config.lame in (-1, ranks.rank())
        if here and calls[0] in config.blunder:
            raise RuntimeError("a mistake of ours")
        if here and calls[0] in config.stumble:
            raise FloatingPointError("the toy stumbles")
        value = error_sum(model, batch)
        if config.spread:
            predicted_BT = model(batch.x_BTD)
            distance_BT = predicted_BT - ranks.whole_batch(predicted_BT).mean(0)
            value = value + config.spread * distance_BT.square().sum()
        if here and calls[0] in config.trip:
            raise FloatingPointError("the toy trips")
        value = value.detach() if calls[0] in config.idle else value
        return {"points": value * float("nan") if here and calls[0] in config.poison else value}

    def evaluate(model: Toy) -> dict[str, float]:
        data = Data()
        if config.val_noise:
            torch.rand(3), np.random.rand(2)  # an evaluation that draws random numbers changes nothing
        batch = data.collate([data.sample(i, None) for i in range(len(data))])
        return {"loss": float(error_sum(model, batch)) / batch.counts["points"]}

    def phase(part: nn.Module, settings: PhaseConfig) -> Callable[[], Stage]:
        def start() -> Stage:
            data = Data(config.bad_rows, config.broken_batch)
            stream = BatchStream(
                data, settings.batch_size, config.run.seed, num_workers=config.run.num_workers, rules=config.data
            )
            return Stage([part], stream, loss, evaluate, settings, {"points": 1.0}, unit="points")

        return start

    return Run(
        kind="toy",
        model=model,
        phases=[("first", phase(model, config.first)), ("second", phase(model.outer, config.second))],
        model_config={"width": config.width, "dropout": config.dropout},
        assets={"notes.txt": b"kept"},
        lineage={"data": config.data_name},
        data_may_change=config.data.on_bad_sample == "skip",
    )


def settings(save_dir: str, **changes: Any) -> Iterator[str]:
    """Command-line words for a run of the toy."""
    for key, value in {"save_dir": save_dir, **changes}.items():
        yield from (f"--{key}", str(value))


if __name__ == "__main__":
    sys.exit(run_stage(ToyConfig, build))
