"""One configuration and variants of it beside each other: quality, time and parameters.

    python -m bench.variants configs/thinker_nano.json --equal time --seeds 0 1 2 \\
        --vary "adamw=--primer.optimizer adamw --train.optimizer adamw"
    python -m bench.variants configs/omni_sft_nano.json --phase sft \\
        --vary "linear=--image_projector.kind linear --audio_projector.kind linear"

Each variant is the stage's script with a few words more; the first one is the configuration as it is. With ``--equal
time`` a variant takes as many steps as fit into the time of the first, by the seconds that a step of the compared phase
takes in short runs in turns; otherwise all take the same steps. Figures are those of the last validation, the mean over
the seeds and, of several, the lowest and the highest. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omni.atomic import write_whole
from omni.config import UserError
from omni.console import user_errors
from omni.curves import read_metrics
from omni.stages import StageInfo, read_raw_config, stage_of_config
from omni.summary import read_summary

_ROOT = Path(__file__).parent.parent
_SHORT, _SKIPPED = 60, 20  # steps of a run that only tells the time of a step, and how many of them do not count


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name, and what is added to the command line."""

    name: str
    words: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``NAME=WORDS``.

        Raises:
            UserError: when it is not like that.
        """
        name, sign, words = text.partition("=")
        if not sign or not name.strip() or not words.strip():
            raise UserError(f'--vary: found {text!r}, expected a name and words such as "small=--model.dim 96"')
        return cls(name.strip(), tuple(shlex.split(words)))


@dataclasses.dataclass(frozen=True)
class Found:
    """What a run came to: parameters, the steps and seconds of the compared phase, and its last validation."""

    parameters: int
    steps: int
    seconds: float
    figures: dict[str, float]


class Bench:
    """Runs a stage's script, each run in a folder of its own."""

    def __init__(self, config: Path, phase: str, out: Path) -> None:
        values = read_raw_config(config)
        self.stage: StageInfo = stage_of_config(config, values)
        self.phases = {name: part for name, part in values.items() if isinstance(part, dict) and "max_steps" in part}
        self.config, self.out, self.phase = config, out, phase or list(self.phases)[-1]
        if self.phase not in self.phases:
            raise UserError(f"--phase: found {self.phase!r}, expected one of {', '.join(self.phases)}")

    def run(self, name: str, words: Sequence[str]) -> Found:
        """Train to the end; what an earlier call has begun goes on, what it has ended is read.

        Raises:
            UserError: when the script fails; what it said stands in ``log.txt``.
        """
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(_ROOT / self.stage.script), "--config", str(self.config)]
        command += ["--save_dir", str(folder), *words]
        print(f"{name} ...", file=sys.stderr, flush=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise UserError(f"{name}: the run ended with exit code {code}; {folder / 'log.txt'} says why")
        return self._read(folder)

    def _read(self, folder: Path) -> Found:
        lines = read_metrics(folder / "metrics.jsonl")
        trained = [line for line in lines if line["event"] == "train"]
        own = [line for line in trained if line["phase"] == self.phase]
        before = [line["timing"]["seconds"] for line in trained[: trained.index(own[0])]]
        (*_, last) = (line for line in lines if line["event"] == "val" and line["phase"] == self.phase)
        figures = {key: value for key, value in last.items() if isinstance(value, float)}
        parameters = sum(read_summary(folder / f"{self.stage.kind}.pt")["parameters"].values())
        return Found(parameters, own[-1]["step"], own[-1]["timing"]["seconds"] - max(before, default=0.0), figures)

    def seconds_per_step(self, variant: Variant, turn: int) -> float:
        """Of the compared phase, in a run of few steps that leaves nothing behind."""
        words = [*variant.words, "--run.print_freq", "5", "--run.val_freq", "1000", "--run.checkpoint_freq", "1000"]
        for name in self.phases:
            words += [f"--{name}.max_steps", str(_SHORT), f"--{name}.warmup_steps", "1"]
        name = f"time_{variant.name}_{turn}"
        self.run(name, words)
        lines = read_metrics(self.out / name / "metrics.jsonl")
        shutil.rmtree(self.out / name)
        own = [line for line in lines if line["event"] == "train" and line["phase"] == self.phase]
        seconds = {line["step"]: line["timing"]["seconds"] for line in own}
        return float(seconds[_SHORT] - seconds[_SKIPPED]) / (_SHORT - _SKIPPED)

    def steps_in_equal_time(self, variants: Sequence[Variant]) -> list[list[str]]:
        """Words that give each variant the time of the first one; asked once, so that runs can go on."""
        file = self.out / "equal_time.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        keys = [shlex.join(variant.words) for variant in variants]
        if not known.keys() >= set(keys):
            known = dict(zip(keys, self._measured_steps(variants), strict=True)) | known  # what has begun goes on
            write_whole(file, (json.dumps(known, indent=1) + "\n").encode())
        return [known[key] for key in keys]

    def _measured_steps(self, variants: Sequence[Variant]) -> list[list[str]]:
        turns = [[self.seconds_per_step(variant, turn) for variant in variants] for turn in range(3)]
        seconds = [statistics.median(column) for column in zip(*turns, strict=True)]
        found = []
        for variant, own in zip(variants, seconds, strict=True):
            print(f"{variant.name}: {1000 * own:.1f} ms a step", file=sys.stderr)
            steps = {name: round(phase["max_steps"] * seconds[0] / own) for name, phase in self.phases.items()}
            found.append([word for name, num in steps.items() for word in (f"--{name}.max_steps", str(num))])
        return found


def table(names: Sequence[str], found: Sequence[Sequence[Found]]) -> str:
    """A row of a Markdown table for each variant; its runs differ in their seeds."""
    figures = list(found[0][0].figures)
    rows = [["variant", "parameters", "steps", "seconds", *figures], ["---"] * (4 + len(figures))]
    for name, runs in zip(names, found, strict=True):
        cells = [f"{runs[0].parameters / 1e6:.3f} M", str(runs[0].steps), spread([run.seconds for run in runs], 0)]
        rows.append([name, *cells, *(spread([run.figures[key] for run in runs], 3) for key in figures)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and of several values the lowest and the highest."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all variants and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=WORDS", help="a variant; may be repeated")
    parser.add_argument("--every", default="", metavar="WORDS", help="added to each variant, the first as well")
    parser.add_argument("--equal", choices=("steps", "time"), default="steps", help="what all have alike (steps)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--phase", default="", help="that is compared; by default the last")
    parser.add_argument("--out", type=Path, default=Path("runs/variants"), help="folder of the runs (runs/variants)")
    words = parser.parse_args(arguments)

    def work() -> int:
        every = tuple(shlex.split(words.every))
        asked = [Variant(words.config.stem), *map(Variant.parse, words.vary)]
        variants = [Variant(variant.name, (*every, *variant.words)) for variant in asked]
        bench = Bench(words.config, words.phase, words.out / words.config.stem)
        steps = bench.steps_in_equal_time(variants) if words.equal == "time" else [[] for _ in variants]
        found = [
            [
                bench.run(f"{variant.name}_{words.equal}_{seed}", [*variant.words, *own, "--run.seed", str(seed)])
                for variant, own in zip(variants, steps, strict=True)
            ]
            for seed in words.seeds
        ]
        print(table([variant.name for variant in variants], list(zip(*found, strict=True))))
        return 0

    return user_errors(work)


if __name__ == "__main__":
    sys.exit(main())
