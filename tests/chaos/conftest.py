"""The micro-world, the five small stages, and their undisturbed runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from omni.data.synthetic import synthesize
from tests.chaos.fork_server import ForkServer
from tests.chaos.small_stages import STAGES, write_config

NEEDS = {"A": "", "B": "", "C": "A", "D": "AB", "E": "ABCD"}


class Stages:
    """Configurations of the small stages, and undisturbed runs of them, made when first asked for."""

    def __init__(self, folder: Path, server: ForkServer) -> None:
        self.folder, self.server = folder, server
        self._made: dict[tuple[str, int], Path] = {}
        synthesize("test", folder, processes=1)

    def config(self, letter: str) -> Path:
        """The configuration of a stage, what it needs trained."""
        inputs = self.folder / "inputs"
        inputs.mkdir(exist_ok=True)
        for earlier in NEEDS[letter]:
            kind = STAGES[earlier].kind
            if not (inputs / f"{kind}.pt").exists():
                shutil.copy(self.whole(earlier) / f"{kind}.pt", inputs)
        path = self.folder / f"{letter}.json"
        return path if path.exists() else write_config(letter, self.folder / "test", inputs, self.folder)

    def whole(self, letter: str, workers: int = 0) -> Path:
        """The folder of a run that nothing disturbed."""
        run = self.folder / f"whole_{letter}_{workers}"
        if (letter, workers) not in self._made:
            outcome = self.server.run(letter, self.config(letter), run, "--num_workers", str(workers))
            assert outcome.code == 0, outcome.said
            self._made[letter, workers] = run
        return self._made[letter, workers]


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def stages(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("stages"), server)
