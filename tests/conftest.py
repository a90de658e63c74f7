"""What several tests use: a small micro-world, and a stage's script run as a person runs it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here, and in every process that is started from here

import numpy as np
import pytest
import soundfile
import torch

from omni.config import StageConfig
from omni.console import log
from omni.training_utils import Build, run_stage

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # the models of the tests are too small for two


def command(*words: str | Path, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these words and return what it said."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
        **options,
    )


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command that is quiet by design, such as those of bench/, leaves the next test its log."""
    level = log.level
    yield
    log.setLevel(level or logging.INFO)  # which the first command sets


Done = subprocess.CompletedProcess[str]
RunStage = Callable[..., Done]


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> RunStage:
    """A stage's script in this process, and what it said: starting another takes seconds of importing."""

    def run(config_class: type[StageConfig], build: Build, *words: str | Path) -> Done:
        capsys.readouterr()
        try:
            code = run_stage(config_class, build, [*map(str, words)])
        except SystemExit as left:  # --help
            code = int(left.code or 0)
        said = capsys.readouterr()
        return Done(words, code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def babble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 short "recordings" (a tone for each letter), their manifest, and a text."""
    folder = tmp_path_factory.mktemp("babble")
    rng = np.random.default_rng(0)
    lines = ["wav,text,speaker"]
    for index in range(24):
        text = "".join(rng.choice(list("abcd "), 6)).strip() or "a"
        tones = [440 * 2 ** (ord(c) % 7 / 3) if c != " " else 0 for c in text]
        time = np.arange(1600 * 2) / 16000
        wave = np.concatenate([0.3 * np.sin(2 * np.pi * tone * time) for tone in tones])
        name, rate = (f"{index}.flac", 16000) if index % 2 else (f"{index}.wav", 8000)
        soundfile.write(folder / name, wave if rate == 16000 else wave[::2], rate)
        lines.append(f"{name},{text},s{index % 3}")
    (folder / "asr.csv").write_text("\n".join(lines) + "\n")
    words = ["the red circle is above the blue square .", "two and two make four .", "is it green ? yes , it is ."]
    text = "\n".join(words[i] for i in rng.integers(0, 3, 1200)) + "\n"
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a configuration and return its path."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / f"{values['name']}.json"
        path.write_text(json.dumps(values))
        return path

    return write


def metrics(save_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` without what depends on the clock."""
    lines = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def write_tone(path: Path, seconds: float, pitch: float = 440) -> None:
    """A short recording."""
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(16000 * seconds)) / 16000), 16000)
