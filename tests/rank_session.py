"""Runs of stages one after the other in the processes of one ``torchrun``, each of which takes seconds to start.

``torchrun ... -m tests.rank_session JOBS.json`` runs a list of jobs: ``module``, ``config_class``, ``words`` of the
command line, and ``copy``: the folder and the one checkpoint of a run that ``save_dir`` (the last word) continues.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from omni.training_utils import run_stage
from tests.chaos.small_stages import STAGES, write_config
from tests.conftest import ROOT

STEPS = 3  # of each phase
TORCHRUN = Path(sys.executable).with_name("torchrun")


def torchrun(log: Path, *words: str | Path, num_ranks: int = 2) -> subprocess.Popen[bytes]:
    """Start ``torchrun`` on this machine alone, one thread a rank; what is said goes to ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = ["--nproc_per_node", str(num_ranks), "--master_addr", "127.0.0.1", "--master_port", str(port), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as said:
        return subprocess.Popen(
            [str(TORCHRUN), *head, *map(str, words)], cwd=ROOT, stdout=said, stderr=said, env=environment
        )


def write_equal_config(letter: str, world: Path, folder: Path) -> Path:
    """A small stage for checkpoints in ``folder/inputs``, without what every rank draws at random by itself."""
    path = write_config(letter, world, folder / "inputs", folder)
    values = json.loads(path.read_text())
    for phase in STAGES[letter].phases:
        # Muon rounds to bf16 and would show differences in the last bit a thousand times as large
        values[phase] |= {
            "max_steps": STEPS, "batch_size": 5, "gradient_accumulation_steps": 2, "optimizer": "adamw", "lr": 0.001,
        }  # fmt: skip
    values["run"] |= {
        "val_freq": STEPS, "checkpoint_freq": 1000, "use_amp": False, "rank_timeout": 120, "max_grad_explosion": 1e9,
    }  # fmt: skip
    _without_dropout(values)
    if letter == "D":
        values["model"]["codec"]["quantizer"]["num_codebooks"] = 2  # of more some are dropped at random
        values["model"]["talker"] |= {"corrupt_previous": 0.0, "drop_states": 0.0}
        # AdamW's first steps are as long where a gradient is nothing but rounding, and the logarithms of an untrained
        # vocoder's nearly silent bins make much of it
        values["vocoder"]["lr"] = 1e-5
    path.write_text(json.dumps(values, indent=1))
    return path


def _without_dropout(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key == "dropout":
            values[key] = 0.0
        elif isinstance(value, dict):
            _without_dropout(value)


def stage_job(letter: str, config: Path, save_dir: Path) -> dict[str, Any]:
    """A stage as its script runs it."""
    script = STAGES[letter]
    words = ["--config", str(config), "--save_dir", str(save_dir)]
    return {"module": script.module, "config_class": script.config_class, "words": words}


def toy_job(config: Path, save_dir: Path, *words: str, copy: tuple[Path, str] | None = None) -> dict[str, Any]:
    """The toy."""
    words = ("--config", str(config), *words, "--save_dir", str(save_dir))
    job = {"module": "tests.toy", "config_class": "ToyConfig", "words": words}
    return job | ({"copy": [str(copy[0]), copy[1]]} if copy else {})


def do(job: dict[str, Any]) -> int:
    """Run a job in this process, be it alone or a rank."""
    if "copy" in job and os.environ.get("RANK", "0") == "0":
        folder, name = Path(job["copy"][0]), job["copy"][1]
        into = Path(job["words"][-1])
        shutil.copytree(folder, into, ignore=shutil.ignore_patterns("*.pt"))
        shutil.copy(folder / name, into)
    module = importlib.import_module(job["module"])
    return run_stage(getattr(module, job["config_class"]), module.build, job["words"])


if __name__ == "__main__":
    for number, wanted in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if os.environ["RANK"] == "0":
            print(f"job {number}", flush=True)
        if code := do(wanted):
            sys.exit(code)
