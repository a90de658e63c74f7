"""The folder of a run: one process writes in it, its checkpoints are whole, and the newest good one is known.

Of several ranks the first one writes; the others read what it has left there, after it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omni import checkpoint, ranks
from omni.atomic import remove_partial_files, write_whole
from omni.config import UserError
from omni.console import log
from omni.lineage import code_version
from omni.training_types import Run


class SaveFolder:
    """``save_dir`` while a run holds it (:func:`omni.checkpoint.claim_folder`).

    Args:
        path: the folder.
        run: whose checkpoints these are.
        fresh: set an earlier run in it aside.
        keep_last: periodic checkpoints that are kept.
    """

    def __init__(self, path: Path, run: Run, fresh: bool, keep_last: int) -> None:
        self.path, self.run, self.keep_last = path, run, keep_last
        self._code = code_version()  # of what runs, whatever is on the disk later on
        self.last_good: Path | None = None
        if ranks.rank() > 0:
            return
        path.mkdir(parents=True, exist_ok=True)
        remove_partial_files(path)
        remove_partial_files(path / "cache")
        if fresh:
            checkpoint.set_aside(path)

    @property
    def final(self) -> Path:
        """The checkpoint of a finished run."""
        return self.path / f"{self.run.kind}.pt"

    def resume(self, seed: int) -> dict[str, Any] | None:
        """Load the newest whole checkpoint's weights into the model and return its training state; None: a new run.

        Raises:
            UserError: when it belongs to another run, or when there are checkpoints and none of them is whole.
        """
        damaged = []
        for path, summary, tensors, problem in checkpoint.resume_candidates(self.path, self.run.kind):
            if tensors is None:
                log.warning("passing over %s", problem)
                damaged.append(path)
                continue
            checkpoint.refuse_another_run(path, summary, self.run, seed)
            training = dict(tensors["training"])
            own = training.pop("own_weights", {})  # of a run whose checkpoints show others (Run.export)
            checkpoint.load_weights(self.run.model, {**tensors["weights"], **own}, str(path))
            self.last_good = path
            for other in damaged:  # so that it is not counted among those that are kept
                other.rename(other.with_name(f"{other.name}.damaged"))
            old, new = summary["code"], self._code
            if old["source"] != new["source"]:
                log.warning("%s was written by other code (%s, now %s)", path, _name(old), _name(new))
            return training
        if damaged:
            raise UserError(
                f"{self.path}: found {len(damaged)} checkpoints and none that can be read, expected a whole one to "
                "continue from; --fresh sets them aside and starts over"
            )
        return None

    def begin(self, config: dict[str, Any]) -> None:
        """Write what stands beside the checkpoints: the resolved configuration and the assets."""
        if ranks.rank() > 0:
            return
        files = {**self.run.assets, "config.json": (json.dumps(config, indent=2) + "\n").encode()}
        for name, data in files.items():
            try:
                write_whole(self.path / name, data)
            except OSError as error:
                raise UserError(
                    f"{self.path / name}: cannot be written ({error.strerror}). {self.standing()}"
                ) from None

    def save(self, name: str, tensors: dict[str, Any], summary: dict[str, Any]) -> None:
        """Write the checkpoint ``name`` and drop periodic ones that are too old.

        Raises:
            UserError: when it cannot be written, saying where training will go on from.
        """
        tensors["assets"] = {name: checkpoint.as_tensor(data) for name, data in self.run.assets.items()}
        facts = {"kind": self.run.kind, "model_config": self.run.model_config, "lineage": self.run.lineage}
        if ranks.rank() == 0:
            try:
                checkpoint.save_checkpoint(self.path / name, tensors, {**summary, **facts, "code": self._code})
            except UserError as error:
                raise UserError(f"{error}. {self.standing()}") from None
        ranks.gather("writing a checkpoint", None)  # who left before it is whole would have torchrun end the writer
        if "training" in tensors:
            self.last_good = self.path / name
            if ranks.rank() == 0:
                checkpoint.prune(self.path, self.run.kind, self.keep_last)

    def standing(self) -> str:
        """Where the same command would go on from."""
        if self.last_good is None:
            return "No checkpoint has been written yet: the same command starts from the beginning"
        return f"The last good checkpoint is {self.last_good}: the same command goes on from there"


def _name(code: dict[str, Any]) -> str:
    return code["commit"] or f"source {code['source']}"
