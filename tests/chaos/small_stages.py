"""The five stages at size nano made much smaller: every phase kept, all randomness of training on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

# wherever a model has dropout it is on, and three codebooks give the quantizer its own
MODELS: dict[str, dict[str, Any]] = {
    "thinker": {
        "ctx_len": 128, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 32, "dropout": 0.1,
    },
    "audio_enc": {
        "dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "conv_kernel": 3, "dropout": 0.1,
        "steps_per_state": 2,
    },
    "vision": {
        "image_size": 32, "dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "stem_depth": 1, "text_dim": 16,
        "text_layers": 1, "text_heads": 2, "text_hidden_dim": 32, "embed_dim": 8, "dropout": 0.1,
    },
    "talker": {
        "codec": {"dim": 16, "num_layers": 1, "quantizer": {"num_codebooks": 3, "codebook_size": 8, "dim": 4}},
        "vocoder": {"dim": 16, "num_layers": 1},
        "speaker": {"dim": 8, "num_layers": 1, "embedding_dim": 4},
        "talker": {"dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "dropout": 0.1},
        "vocoder_kind": "istft",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Script:
    """A stage: its script, the configuration class there, its checkpoint's name, its phases."""

    module: str
    config_class: str
    kind: str
    phases: tuple[str, ...]
    steps: int  # of each phase

    @property
    def total_steps(self) -> int:
        return self.steps * len(self.phases)


STAGES = {
    "A": Script("train_text", "TextConfig", "thinker", ("primer", "train"), 15),
    "B": Script("train_audio_enc", "AudioConfig", "audio_enc", ("train",), 30),
    "C": Script("train_vision", "VisionStageConfig", "vision", ("train",), 30),
    "D": Script("train_talker", "SpeechStageConfig", "talker", ("codec", "speaker", "vocoder", "talker"), 10),
    "E": Script("sft_omni", "OmniSFTConfig", "omni", ("projectors", "sft", "talker"), 10),
}
_FILES = {"A": "thinker", "B": "audio_enc", "C": "vision", "D": "talker", "E": "omni_sft"}
_BATCH_SIZES = {"A": 2, "B": 4, "C": 6, "D": 4, "E": 6}


def write_config(letter: str, world: Path, inputs: Path, out: Path) -> Path:
    """Write a stage's configuration into ``out``; it reads ``world`` and the checkpoints in ``inputs``."""
    script = STAGES[letter]
    values = json.loads((ROOT / "configs" / f"{_FILES[letter]}_nano.json").read_text())
    values["name"] = f"{script.kind}_chaos"
    for key, value in values["data"].items():
        if isinstance(value, str):
            values["data"][key] = value.replace("data/nano", str(world))
    for key in ("thinker_ckpt", "audio_ckpt", "vision_ckpt", "talker_ckpt"):
        if key in values:
            values[key] = str(inputs / Path(values[key]).name)
    if script.kind in MODELS:
        values["model"] = MODELS[script.kind]
    for phase in script.phases:
        of_nano = values.get(phase) or values.get("speaker") or values["projectors"]  # nano does not have all of them
        values[phase] = of_nano | {
            "max_steps": script.steps, "batch_size": _BATCH_SIZES[letter], "gradient_accumulation_steps": 3,
            "warmup_steps": 2,
        }  # fmt: skip
    values["run"] = {
        "checkpoint_freq": 2, "val_freq": 3, "val_batches": 1, "print_freq": 1, "keep_last": 2, "num_threads": 1,
        "device": "cpu", "tensorboard": False,
    }  # fmt: skip
    _of_stage(letter, values)
    path = out / f"{letter}.json"
    path.write_text(json.dumps(values, indent=1))
    return path


def _of_stage(letter: str, values: dict[str, Any]) -> None:
    """What only one stage has."""
    if letter == "A":
        values["data"]["vocab_size"] = 400
    if letter == "B":
        values["data"]["spec_augment"] = True
    if letter == "D":
        values["use_thinker_states"] = True  # so that stage E has its third phase
    if letter in "DE":
        values["val_sentences"] = 1
    if letter == "E":
        values["data"] |= {"val_questions": 1}
        for projector in ("image_projector", "audio_projector"):
            values[projector]["hidden_dim"] = 16
