"""What the feature cache saves: an epoch of a phase of stage E without it, the first one with it, and the second.

    python -m bench.features configs/omni_sft_nano.json --chats 1280

Features are those of pictures and recordings, and the words of these. The phase is `projectors`. Each epoch begins as a
run does, with the checkpoints of stages A to D and an empty memory: features are encoded or read from the disk, then
the chats are trained on once. All three see the same batches, and end with the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from omni.config import RunConfig, UserError, load_config, to_dict
from omni.console import log, user_errors
from omni.data.parts import ChatParts, read_chat_parts
from omni.rehearsal import Rehearsal
from omni.runtime import Precision, seed_everything, setup_compute
from omni.training_types import Run
from sft_omni import ChatPhases, OmniSFTConfig, assemble

Item = TypeVar("Item")


class Epoch(NamedTuple):
    """Seconds until the features were there, seconds of all of it, and the weights at its end."""

    features: float
    whole: float
    weights: dict[str, torch.Tensor]


def epoch(config: OmniSFTConfig, parts: ChatParts, precision: Precision) -> Epoch:
    """Encode or read the features of the samples, and train on them once."""
    seed_everything(config.run.seed)
    model, tokenizer, _ = assemble(config)
    model.to(precision.device).eval()
    phases = ChatPhases(model, tokenizer, parts, config, precision)
    began = time.perf_counter()
    with precision.autocast():
        phases.chats("training")
    features = time.perf_counter() - began
    run = Run("omni", model, [("projectors", phases.projectors)], to_dict(model.config))
    loop = Rehearsal(run, config, precision)
    for _ in loop.phases():
        for _ in range(-(-len(parts.training) // loop.stage.config.batch_size)):
            loop.step()
    whole = time.perf_counter() - began
    return Epoch(features, whole, {name: parameter.detach().clone() for name, parameter in loop.named})


def some_parts(config: OmniSFTConfig, num: int) -> ChatParts:
    """What the phase reads, with so many chats with pictures or recordings, evenly spread."""
    data = config.data
    parts = read_chat_parts(data.train, data.val, None, None, data)
    chats = spread([chat for chat in parts.training if chat.media], num)
    return dataclasses.replace(parts, training=chats, validation=spread(parts.validation, 32))


def spread(found: Sequence[Item], num: int) -> list[Item]:
    """So many of them, evenly spread."""
    return [*found[:: max(1, len(found) // num)]][:num]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the three epochs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument("--chats", type=int, default=1280, help="with pictures or recordings (1280)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    words = parser.parse_args(arguments)
    log.setLevel("ERROR")

    def work() -> int:
        config = load_config(OmniSFTConfig, words.config)
        precision = setup_compute(RunConfig(device=words.device))
        data = config.data
        parts = some_parts(config, words.chats)
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, gigabytes in (
                ("no cache", 0.0),
                ("first epoch", data.feature_cache_gb),
                ("second epoch", data.feature_cache_gb),
            ):
                own = dataclasses.replace(data, feature_cache=f"{folder}/cache", feature_cache_gb=gigabytes)
                run = dataclasses.replace(config.run, save_dir=f"{folder}/{name}")
                found[name] = epoch(dataclasses.replace(config, data=own, run=run), parts, precision)
                print(f"{name}: {found[name].whole:.1f} s, of which features {found[name].features:.1f} s", flush=True)
        plain, second = found["no cache"], found["second epoch"]
        print(
            f"second epoch: features {plain.features / second.features:.1f} times as fast, "
            f"all of it {plain.whole / second.whole:.2f} times; {len(parts.training)} chats"
        )
        for one in found.values():
            if any(not torch.equal(plain.weights[name], weight) for name, weight in one.weights.items()):
                raise UserError("the cache changed the weights, expected the same")
        return 0

    return user_errors(work)


if __name__ == "__main__":
    sys.exit(main())
