"""The five stages by name: which script trains one, what it leaves, and what it needs. Needs no torch.

The scripts know nothing of one another; this table is what the ``omni`` command knows of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.config import UserError


@dataclass(frozen=True)
class StageInfo:
    """One stage.

    Attributes:
        letter: A to E.
        script: the file in the root that trains it.
        prefix: of its configurations, ``configs/<prefix>_<size>.json``.
        kind: of its final checkpoint, ``<kind>.pt``.
        needs: kinds of the stages whose checkpoints it is built on.
        figures: the objects of ``omni eval --json`` that come from it.
        title: what it trains, in a few words.
        options: kinds among ``needs`` that it does without unless this key of its configuration is true.
    """

    letter: str
    script: str
    prefix: str
    kind: str
    needs: tuple[str, ...]
    figures: tuple[str, ...]
    title: str
    options: Mapping[str, str] = field(default_factory=dict)

    def needs_of(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """What it needs of other stages as it is configured."""
        return tuple(kind for kind in self.needs if kind not in self.options or values.get(self.options[kind]))

    def config_path(self, size: str) -> Path:
        """Its shipped configuration of a size."""
        return Path(f"configs/{self.prefix}_{size}.json")

    def command(self, size: str) -> str:
        """What a person types to train it."""
        return f"python {self.script} --config {self.config_path(size)}"

    def checkpoint(self, size: str) -> Path:
        """Its final checkpoint, where its configuration puts it.

        Raises:
            UserError: when there is neither such a configuration nor such a checkpoint here.
        """
        usual = Path(f"checkpoints/{self.prefix}_{size}") / f"{self.kind}.pt"
        if usual.exists() and not self.config_path(size).exists():
            return usual  # of a shipped configuration that was changed on the command line, `save_dir` included
        values = read_raw_config(self.config_path(size))
        save_dir = values["run"]["save_dir"] if values.get("run", {}).get("save_dir") else ""
        return Path(save_dir or f"checkpoints/{values['name']}") / f"{self.kind}.pt"


STAGES = (
    StageInfo("A", "train_text.py", "thinker", "thinker", (), ("thinker",), "Thinker: text"),
    StageInfo("B", "train_audio_enc.py", "audio_enc", "audio_enc", (), ("audio_enc",), "audio encoder: hearing"),
    StageInfo("C", "train_vision.py", "vision", "vision", ("thinker",), ("vision",), "vision encoder: seeing"),
    StageInfo(
        "D", "train_talker.py", "talker", "talker", ("thinker", "audio_enc"), ("codec", "talker"),
        "codec, vocoder, Talker: speaking", {"thinker": "use_thinker_states"},
    ),
    StageInfo(
        "E", "sft_omni.py", "omni_sft", "omni", ("thinker", "audio_enc", "vision", "talker"), ("omni",),
        "omni model: all of it together",
    ),
)  # fmt: skip


def stage_of(kind: str) -> StageInfo:
    """The stage that leaves ``<kind>.pt``."""
    return next(stage for stage in STAGES if stage.kind == kind)


# Grades speech output beside stage B: another architecture and another seed, recordings and voices of its own. Sizes
# without a configuration for it do without.
JUDGE = StageInfo("J", "train_audio_enc.py", "judge", "audio_enc", (), (), "a second recognizer that only grades")

# Guesses ahead for the Thinker of its size (omni/decoding.py), whose tokenizer it has; `omni run` does not train it
DRAFT = StageInfo("A", "train_text.py", "draft", "thinker", ("thinker",), (), "a small Thinker that guesses ahead")


def stage_of_script(script: str) -> StageInfo | None:
    """The stage that a script trains; None of a script that is none of the five."""
    return next((stage for stage in STAGES if stage.script == Path(script).name), None)


def stage_of_config(path: Path, values: dict[str, Any]) -> StageInfo:
    """The stage that a configuration is for, by its name (``<prefix>_<size>``) or by its file's.

    Raises:
        UserError: when neither says.
    """
    names = (values["name"], path.stem)
    for stage in (*STAGES, JUDGE, DRAFT):
        if any(name == stage.prefix or name.startswith(f"{stage.prefix}_") for name in names):
            return stage
    prefixes = ", ".join(f"{stage.prefix}_..." for stage in STAGES)
    raise UserError(f"{path}: name: found {values['name']!r}, expected a stage's: {prefixes}")


def stages_of(size: str) -> tuple[StageInfo, ...]:
    """The stages of a size in the order of training, with the judge where the size has a configuration for it."""
    return (*STAGES[:-1], JUDGE, STAGES[-1]) if JUDGE.config_path(size).exists() else STAGES


def read_raw_config(path: Path) -> dict[str, Any]:
    """A configuration file as plain values; the stage script checks them.

    Raises:
        UserError: when it is missing or is not a JSON object with a name.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        sizes = sorted(p.stem.removeprefix("thinker_") for p in path.parent.glob("thinker_*.json"))
        hint = f"a size of {', '.join(sizes)}" if sizes else "to be run from the repository's folder"
        raise UserError(f"{path}: no such configuration, expected {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a JSON configuration ({error})") from None
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise UserError(f'{path}: found no "name", expected a configuration such as {{"name": "thinker_nano", ...}}')
    return values
