"""The final checkpoints of all stages of a run of size "toy", from random weights, with held-out data for each."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from omni.checkpoint import as_tensor, save_checkpoint
from omni.config import to_dict
from omni.models.audio_encoder import AudioEncoder
from omni.models.speech import SpeechModel
from omni.stages import STAGES
from tests import toy_omni
from tests.conftest import write_tone
from tests.small_shapes import AUDIO_SHAPE, speech_shape
from tests.test_inspect import EMPTY

DOCUMENTS = [
    "<|user|> what is it?<|end|><|assistant|> a ring<|end|>",
    "the small triangle is above the large blue star, and two and two make four.",
    "who has the green ball? ben has the ball, and it is red.",
    "<|user|> who has it?<|end|><|assistant|> ben<|end|><|user|> and now?<|end|><|assistant|> no<|end|>",
]
SENTENCES = ["a red cat.", "the end.", "it is no one at an inn.", "it is it."]


def make(folder: Path) -> None:
    """Write data and checkpoints; paths in them are as seen from ``folder``."""
    _write_data(folder / "data")
    omni, tokenizer = toy_omni.build()
    torch.manual_seed(5)
    hearing = AudioEncoder(AUDIO_SHAPE).eval()
    speaking = SpeechModel(speech_shape(vocoder_kind="istft", voices=("ann", "bob"))).eval()
    text = {"train": "data/text.txt", "test": "data/text.txt", "separate_documents": True}
    sounds = {"test": "data/tts.csv", "test_words": "data/tts.csv", "test_voices": "data/tts.csv"}
    models: dict[str, tuple[torch.nn.Module, Any, dict[str, Any]]] = {
        "thinker": (omni.thinker, omni.config.thinker, text),
        "audio_enc": (hearing, hearing.config, {"test": "data/tts.csv", "test_voices": "data/tts.csv"}),
        "vision": (omni.vision_encoder, omni.config.vision_encoder,
                   {"test": "data/images.json", "test_combinations": "data/images.json"}),
        "talker": (speaking, speaking.config, sounds),
        "omni": (omni, omni.config, {"test": "data/sft.jsonl", "feature_cache": None}),
    }  # fmt: skip
    inputs = {
        f"{name.removesuffix('_enc')}_ckpt": f"checkpoints/{name}_toy/{name}.pt"
        for name in ("thinker", "audio_enc", "vision", "talker")
    }
    for stage in STAGES:
        model, config, data = models[stage.kind]
        data = {"train": None, "val": None, **data}
        summary = {
            "kind": stage.kind, **EMPTY, "model_config": to_dict(config),
            "config": {"name": f"{stage.prefix}_toy", "data": data, "run": {"seed": 0}, **inputs},
            "lineage": {"audio_enc": "0"} if stage.kind == "talker" else {},
        }  # fmt: skip
        tensors = {"weights": model.state_dict(), "assets": {"tokenizer.model": as_tensor(tokenizer.model)}}
        path = folder / f"checkpoints/{stage.prefix}_toy/{stage.kind}.pt"
        save_checkpoint(path, tensors, summary)
        (path.parent / "metrics.jsonl").write_text(
            "".join(json.dumps({"phase": "train", "step": step, "event": "train", "loss": 5 / step}) + "\n"
                    for step in range(1, 6))
        )  # fmt: skip


def _write_data(folder: Path) -> None:
    folder.mkdir()
    (folder / "text.txt").write_text("\n\n".join(DOCUMENTS * 4) + "\n")
    rows, pictures = [["wav", "text", "speaker"]], []
    for number, text in enumerate(SENTENCES):
        write_tone(folder / f"{number}.wav", 0.6 + 0.1 * number, 200 + 60 * number)
        rows.append([f"{number}.wav", text, ["ann", "bob"][number % 2]])
        image = Image.new("RGB", (32, 32), (250, 250 - 40 * number, 90))
        ImageDraw.Draw(image).ellipse((4, 6, 12 + 4 * number, 20), (30 * number, 60, 200))
        image.save(folder / f"{number}.png")
        swaps = {"shape": f"a {number} square", "size": f"a {number} small ring"}
        pictures.append({"image": f"{number}.png", "caption": f"a {number} ring", "swaps": swaps})
    with (folder / "tts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "images.json").write_text(json.dumps(pictures))
    write_chats(folder, {})


def write_chats(folder: Path, answers: dict[str, str]) -> None:
    """Chats of every task; the right answers are "a ring" but for those that are given by task and number."""
    lines = []
    for number in range(4):
        picture, sound = {"type": "image", "image": f"{number}.png"}, {"type": "audio", "audio": f"{number}.wav"}
        asked = {"type": "text", "text": f"what is it number {number}?"}
        for task, parts in (
            ("text_qa", [asked]), ("image_qa", [picture, asked]), ("speech_qa", [sound]),
            ("image_speech_qa", [sound, picture]), ("asr", [sound, asked]), ("speech_out", [asked]),
        ):  # fmt: skip
            answer = {"role": "assistant", "content": answers.get(f"{task} {number}", "a ring")}
            chat = {"task": task, "template": task, "messages": [{"role": "user", "content": parts}, answer]}
            lines.append(json.dumps(chat | ({"transcript": "what is it"} if sound in parts else {})))
        unseen = {"task": "image_qa", "template": "image_qa", "held_out": "combination",
                  "messages": [{"role": "user", "content": [picture, asked]}, answer]}  # fmt: skip
        lines.append(json.dumps(unseen))
    (folder / "sft.jsonl").write_text("\n".join(lines) + "\n")
