"""Measure the stages on this machine: ``python -m bench [--size nano] [--json FILE]``; `make bench` calls it.

Each configuration runs in a process of its own, on data of `omni data synth` where they are there and on stand-ins of
the same lengths where they are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import bare

MISSING = bare.fill_in()

import torch  # noqa: E402

from bench.measure import (  # noqa: E402
    foretold,
    largest_batch,
    matmul_peak,
    measure_stage,
    request_of,
    timed_loop,
)
from omni.config import RunConfig, UserError  # noqa: E402
from omni.console import log, user_errors  # noqa: E402
from omni.plan_view import size_text  # noqa: E402
from omni.runtime import pick_precision, setup_compute  # noqa: E402
from omni.stages import STAGES, stage_of_config  # noqa: E402


def main() -> int:
    """Run everything, or with ``--only`` one configuration in this process."""
    words = _words()
    if words.only:
        found = measure_one(words.only, words)
        words.json.write_text(json.dumps(found), encoding="utf-8")
        return 0
    results: dict[str, Any] = {"machine": machine(), "stages": [], "peers": [], "memory": [], "failed": []}
    for path in words.configs or [stage.config_path(words.size) for stage in STAGES]:
        found = _in_process(path, words)
        if found is None:
            results["failed"].append(str(path))
            continue
        for key in ("stages", "peers", "memory"):
            results[key] += found[key]
    text = table(results)
    print(text)
    if words.json:
        words.json.parent.mkdir(parents=True, exist_ok=True)
        words.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if results["failed"] else 0


def _words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG.json", help="instead of all of a size")
    parser.add_argument("--size", default="nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each measurement (20)")
    parser.add_argument(
        "--memory", type=float, default=0.0, metavar="GB", help="hold the process to so much of the GPU"
    )
    parser.add_argument("--compile", action="store_true", help="our blocks through torch.compile, without peers")
    parser.add_argument("--no-peers", action="store_true", help="the stages alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_process(path: Path, words: argparse.Namespace) -> dict[str, Any] | None:
    """One configuration in a process of its own; None where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bench", "--only", str(path), "--json", str(file), "--device", words.device]
        command += ["--threads", str(words.threads), "--seconds", str(words.seconds), "--memory", str(words.memory)]
        command += [word for word in ("--no-peers", "--compile") if getattr(words, word[2:].replace("-", "_"))]
        print(f"{path} ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or not file.exists():
            print(f"{path}: failed\n{(done.stdout + done.stderr)[-3000:]}", file=sys.stderr)
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for reason in found["left_out"]:
            print(f"{path}: {reason}", file=sys.stderr)
        return found


def measure_one(path: Path, words: argparse.Namespace) -> dict[str, Any]:
    """Stage, peers and, on CUDA, foretold memory of one configuration."""
    device = setup_compute(RunConfig(device=words.device, num_threads=words.threads)).device
    precision = pick_precision(device, use_amp=True)
    if words.memory and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, words.memory * 2**30 / whole), device)
    peak = matmul_peak(precision)
    found: dict[str, Any] = {"stages": [], "peers": [], "memory": [], "left_out": []}
    found["stages"] = measure_stage(path, precision, words.seconds, peak, compiled=words.compile)
    if not (words.no_peers or words.compile):
        try:
            found["peers"] = measure_peers(path, precision, words.seconds)
        except (ImportError, UserError) as error:
            found["left_out"].append(f"no peer: {error}")
    if device.type == "cuda" and not words.compile:  # compiled, there is no plan to hold it against
        found["memory"] = foretold(path, precision)
    return found


def measure_peers(path: Path, precision: Any, seconds: float) -> list[dict[str, Any]]:
    """The peers of a configuration's stage; none where it has none.

    At equal settings both take AdamW; beside a peer with its defaults ours has its own, the optimizer included.
    """
    from bench.peers import PEERS, measure_peer, measure_trainer

    request, found = request_of(path), list[dict[str, Any]]()
    peer = PEERS.get(stage_of_config(path, request.values).kind)
    if peer is None:
        return []
    request.values["data"].update(peer.data)
    for measure, changes in ((measure_peer, {"optimizer": "adamw"}), (measure_trainer, {})):
        with timed_loop(request, precision, max(512, 2 * largest_batch(request)), **changes) as loop:
            for name in loop.phases():
                if name == "train":  # a phase before it takes the same steps on other data
                    if peer.loss is not None:
                        loop.stage = dataclasses.replace(loop.stage, compute_loss=peer.loss)
                    loop.begin(name)
                    found.append({"config": path.stem, "phase": name} | measure(loop, seconds))
    return found


def machine() -> dict[str, Any]:
    """What it was measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "packages_missing": MISSING,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as tables for docs/results.md."""
    stages = {
        "phase": lambda row: f"{row['config']}, {row['phase']}",
        "batch": lambda row: row["batch"],
        "throughput": lambda row: f"{row['throughput']:,.0f} {row['unit']}/s",
        "step": lambda row: f"{1000 * row['seconds_per_step']:.1f} ms",
        "waiting": lambda row: f"{row['waiting']:.1%}",
        "overhead": lambda row: f"{row['overhead']:+.1%}",
        "MFU": lambda row: f"{row['mfu']:.3f}",
        "padding": lambda row: f"{row['padding']:.1%}",
        "peak memory": lambda row: size_text(row["peak_memory"]) if row["peak_memory"] else "",
    }
    peers = {
        "configuration": lambda row: row["config"],
        "peer": lambda row: row["peer"],
        "setting": lambda row: row["setting"],
        "its throughput": lambda row: f"{row['peer_throughput']:,.0f} {row['unit']}/s",
        "ours": lambda row: f"{row['throughput']:,.0f}",
        "ratio": lambda row: f"{row['ratio']:.2f}",
    }
    memory = {
        "phase": lambda row: f"{row['config']}, {row['phase']}",
        "memory foretold": lambda row: size_text(row["foretold"]),
        "measured": lambda row: size_text(row["measured"]),
        "difference": lambda row: f"{row['error']:+.1%}",
        "reserved": lambda row: size_text(row["reserved"]),
    }
    tables = [_table(results["stages"], stages), _table(results["peers"], peers), _table(results["memory"], memory)]
    return "\n\n".join(filter(None, [f"{results['machine']['device']}, torch {results['machine']['torch']}", *tables]))


def _table(rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], object]]) -> str:
    """A row of a Markdown table for each result; nothing where there are none."""
    lines = [[str(cell(row)) for cell in columns.values()] for row in rows]
    head = [list(columns), ["---"] * len(columns)] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in [*head, *lines])


if __name__ == "__main__":
    log.setLevel("ERROR")
    sys.exit(user_errors(main))
