"""Stage E as small as it gets: untrained checkpoints of the stages before it, a few chats, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import sft_omni
from omni.checkpoint import as_tensor, save_checkpoint
from omni.config import to_dict
from omni.models.audio_encoder import AudioEncoder
from omni.models.speech import SpeechModel
from omni.models.thinker import Thinker, ThinkerConfig
from omni.models.vision_encoder import VisionEncoder
from omni.tokenizer import Tokenizer
from omni.training_utils import run_stage
from tests.conftest import write_tone
from tests.small_shapes import AUDIO_SHAPE, speech_shape, vision_shape

TEXT = "the red circle is above the blue square.\nwhat is this? a red ring, or two.\nyes or no? it is green.\n"


def make_world(folder: Path) -> Path:
    """Write everything that a small stage E needs; returns its configuration."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(TEXT.splitlines() * 30, 320)
    size = tokenizer.vocab_size
    thinker = ThinkerConfig(
        ctx_len=64, vocab_size=size, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=48, dropout=0.1
    )
    audio, vision, speech = AUDIO_SHAPE, vision_shape(size), speech_shape()
    models = {
        "thinker": (Thinker(thinker), thinker), "audio_enc": (AudioEncoder(audio), audio),
        "vision": (VisionEncoder(vision), vision), "talker": (SpeechModel(speech), speech),
    }  # fmt: skip
    for kind, (model, config) in models.items():
        tensors = {"weights": model.state_dict(), "assets": {"tokenizer.model": as_tensor(tokenizer.model)}}
        summary = {"kind": kind, "model_config": to_dict(config), "lineage": {"tokenizer": tokenizer.hash}}
        save_checkpoint(folder / f"{kind}.pt", tensors, summary)
    for number in range(9):
        Image.new("RGB", (40, 32), (20 * number, 90, 200 - 20 * number)).save(folder / f"{number}.png")
        write_tone(folder / f"{number}.wav", 0.5 + 0.1 * number, 200 + 50 * number)
    for part, numbers in (("train", range(6)), ("val", range(6, 9))):
        chats = [chat for number in numbers for chat in _chats(number)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "text.txt").write_text("\n\n".join(f"{TEXT.strip()} it is number {i}." for i in range(40)))
    return _config(folder)


def _chats(number: int) -> list[dict[str, Any]]:
    picture, sound = {"type": "image", "image": f"{number}.png"}, {"type": "audio", "audio": f"{number}.wav"}
    asked = {"type": "text", "text": "what is this?"}
    return [
        _chat("text_qa", [asked], "a red ring"),
        _chat("image_qa", [picture, asked], "a red ring"),
        _chat("speech_qa", [sound], "it is green.", transcript="two"),
        _chat("image_speech_qa", [sound, asked, picture], "yes"),
    ]


def _chat(task: str, content: list[dict[str, str]], answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"task": task, "template": task, **more, "messages": turns}


def _config(folder: Path) -> Path:
    phase = {"max_steps": 6, "batch_size": 4, "lr": 0.01, "warmup_steps": 1, "gradient_accumulation_steps": 2}
    values = {
        "name": "omni_small",
        "thinker_ckpt": str(folder / "thinker.pt"), "audio_ckpt": str(folder / "audio_enc.pt"),
        "vision_ckpt": str(folder / "vision.pt"), "talker_ckpt": str(folder / "talker.pt"),
        "data": {
            "train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl"),
            "replay_text": str(folder / "text.txt"), "val_questions": 2,
        },
        "image_projector": {"stack": 3, "hidden_dim": 16},
        "audio_projector": {"kind": "linear", "stack": 5, "hidden_dim": 16},
        "projectors": {**phase, "max_steps": 3}, "sft": phase, "talker": phase,
        "run": {"val_freq": 3, "checkpoint_freq": 2, "print_freq": 1, "keep_last": 9, "tensorboard": False,
                "device": "cpu", "num_threads": 1},
    }  # fmt: skip
    path = folder / "omni_small.json"
    path.write_text(json.dumps(values))
    return path


def train(config: Path, save_dir: Path, *words: str) -> int:
    """Run stage E; returns the exit code."""
    return run_stage(
        sft_omni.OmniSFTConfig, sft_omni.build, ["--config", str(config), "--save_dir", str(save_dir), *words]
    )
