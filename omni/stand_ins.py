"""Stand-ins for what a stage trains on: data of the right shapes, and untrained checkpoints of the stages before it.

A plan is wanted before there is anything. So a stage can be given samples that are only as long as real ones, and
checkpoints that are only as large, and then runs through its own script, not through a model of it. Where the data are
there, the stand-ins are some of them (the longest, or evenly spread by length); else noise and made-up words, as long
as those of the micro-world.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from omni.audio import save_wav
from omni.checkpoint import as_bytes, as_tensor, load_checkpoint, save_checkpoint
from omni.config import UserError, from_dict, to_dict
from omni.data.images import scan_image_manifest
from omni.data_memory import LENIENT, rows_of, seconds_of
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from omni.models.speech import SpeechConfig, SpeechModel, filled_in
from omni.models.thinker import Thinker, ThinkerConfig
from omni.models.vision_encoder import VisionConfig, VisionEncoder
from omni.parallel import map_small
from omni.stages import StageInfo, read_raw_config, stage_of
from omni.summary import read_summary
from omni.tokenizer import Characters, Tokenizer

Item = TypeVar("Item")

# From shortest to longest in ten steps: seconds of 1,500 recordings of `omni data synth --size tiny`, words of
# 500 of its captions
SECONDS = (0.5, 1.5, 1.8, 2.0, 2.3, 2.5, 2.8, 3.3, 3.9, 4.7, 12.8)
CAPTION_WORDS = (8, 8, 9, 10, 16, 17, 19, 19, 21, 25, 28)
_LEARNED_FROM = 3_000_000  # characters of a text from which a stand-in tokenizer is learned


@dataclass(frozen=True)
class Wanted:
    """How many samples, and which: the longest there are, for memory; or evenly spread by length, for time."""

    num: int
    longest: bool

    def pick(self, items: Sequence[Item], length: Callable[[Item], float]) -> list[Item]:
        """``num`` of the items, which come again where they are too few."""
        ordered = sorted(items, key=length, reverse=True)
        if self.longest:  # all as long as the longest: of a batch of them, nothing is shorter
            return list(itertools.islice(itertools.cycle(ordered[:1]), self.num))
        return [ordered[(2 * index + 1) * len(ordered) // (2 * self.num) % len(ordered)] for index in range(self.num)]

    def lengths(self, quantiles: Sequence[float]) -> list[float]:
        """``num`` lengths that are spread like these quantiles."""
        if self.longest:
            return [quantiles[-1]] * self.num
        places = (np.arange(self.num) + 0.5) / self.num
        return [float(item) for item in np.interp(places, np.linspace(0, 1, len(quantiles)), quantiles)]


def stand_in(stage: StageInfo, values: dict[str, Any], configs: Path, folder: Path, wanted: Wanted) -> dict[str, Any]:
    """A configuration, as plain values, with its data and inputs replaced by stand-ins in ``folder``.

    Args:
        stage: whose configuration it is.
        values: the configuration.
        configs: the folder in which configurations of earlier stages are looked for, where their checkpoints are not
            there yet.
        folder: an empty folder.
        wanted: which samples.

    Raises:
        UserError: when neither an input's checkpoint nor the configuration that leads to it can be found.
    """
    return _StandIns(values, configs, folder, wanted).of(stage.kind)


class _StandIns:
    """The stand-ins of one configuration."""

    def __init__(self, values: dict[str, Any], configs: Path, folder: Path, wanted: Wanted) -> None:
        self.values: dict[str, Any] = json.loads(json.dumps(values))
        self.data: dict[str, Any] = self.values["data"]
        self.configs, self.folder, self.wanted = configs, folder, wanted
        self.words = _words(random.Random(0))

    def of(self, kind: str) -> dict[str, Any]:
        {
            "thinker": self._text,
            "audio_enc": self._hear,
            "vision": self._see,
            "talker": self._speak,
            "omni": self._chat,
        }[kind]()
        self.data |= {"allow_leaks": True, "allow_outside_paths": True, "on_bad_sample": "error"}
        self.values["run"] |= {"save_dir": str(self.folder / "run"), "tensorboard": False}
        return self.values

    # ---- what each stage reads ----

    def _text(self) -> None:
        text = self._some_text(self.values["model"]["ctx_len"], self.data["train"], self.data["vocab_size"])
        path = self.folder / "text.txt"
        path.write_text(text, encoding="utf-8")
        self.data |= {"train": str(path), "val": str(path), "primer": str(path) if self.data["primer"] else None}

    def _hear(self) -> None:
        path = self._recordings(self.data["train"])
        self.data |= {"train": path, "val": path, "also_train": []}

    def _see(self) -> None:
        tokenizer = self._thinker(self.values["thinker_ckpt"])
        self.values["thinker_ckpt"] = str(self.folder / "thinker.pt")
        rows = self._pictures(self.data["train"], self.values["model"]["image_size"], tokenizer)
        path = self.folder / "annotations.json"
        path.write_text(json.dumps(rows))
        self.data |= {"train": str(path), "val": str(path), "also_train": []}

    def _speak(self) -> None:
        path = self._recordings(self.data["train"])
        self.data |= {"train": path, "val": path, "also_train": []}
        self._audio_encoder(self.values["audio_ckpt"])
        self.values["audio_ckpt"] = str(self.folder / "audio_enc.pt")
        if self.values["use_thinker_states"] and self.values["thinker_ckpt"]:
            self._thinker(self.values["thinker_ckpt"])
            self.values["thinker_ckpt"] = str(self.folder / "thinker.pt")

    def _chat(self) -> None:
        tokenizer = self._thinker(self.values["thinker_ckpt"])
        ctx_len = self.values["ctx_len"] or self._ctx_len
        self._audio_encoder(self.values["audio_ckpt"], hears=False)  # the chats say the words themselves
        image_size = self._vision(self.values["vision_ckpt"], tokenizer)
        self._speech(self.values["talker_ckpt"], tokenizer)
        names = {"thinker_ckpt": "thinker", "audio_ckpt": "audio_enc", "vision_ckpt": "vision", "talker_ckpt": "talker"}
        self.values |= {key: str(self.folder / f"{kind}.pt") for key, kind in names.items()}
        chats = self.folder / "chats.jsonl"
        lines = self._chats(ctx_len, image_size, tokenizer)
        chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = self.folder / "text.txt"
        text.write_text(self._some_text(ctx_len, self.data["replay_text"], 0), encoding="utf-8")
        self.data |= {"train": str(chats), "val": str(chats), "task_weights": {}, "feature_cache_gb": 0.0}
        self.data |= {"feature_cache": None, "replay_text": str(text) if self.data["replay_text"] else None}
        if self.data["speech_train"]:
            self.data["speech_train"] = self._recordings(self.data["speech_train"], "speech_train")
        self.data["speech_val"] = self.data["speech_train"]

    # ---- data ----

    def _some_text(self, ctx_len: int, real: str | None, vocab_size: int) -> str:
        """Documents: of the real text where it is there; else made-up words, enough for a vocabulary.

        What is to take the most memory has several in every window: that needs a mask in each layer.
        """
        num_chars = max(4 * self.wanted.num * ctx_len, 40 * vocab_size, 20_000)
        found = _beginning(real, num_chars, max(num_chars, _LEARNED_FROM if vocab_size else 0))
        if found and self.wanted.longest:
            cut = (found[at : at + ctx_len].split() for at in range(0, len(found), ctx_len))
            return "\n\n".join(" ".join(words) for words in cut) + "\n"
        if found:
            return found
        rng, size, documents = random.Random(1), 0, []
        while size < num_chars:
            documents.append(_sentences(rng, self.words, ctx_len // (8 if self.wanted.longest else 2)))
            size += len(documents[-1])
        return "\n\n".join(documents) + "\n"

    def _recordings(self, real: str, name: str = "train") -> str:
        """A manifest of recordings, of its own name."""
        rows: list[tuple[str, str, str]]
        found = rows_of(real)
        if found:
            seconds = map_small(seconds_of, found)
            pairs = [pair for pair in zip(found, seconds, strict=True) if pair[1]]
            chosen = self.wanted.pick(pairs, lambda pair: pair[1])
            rows = [
                (str(row.path("wav").resolve()), str(row.values["text"]), str(row.values.get("speaker") or ""))
                for row, _ in chosen
            ]
        else:
            rows = [(path, text, f"voice {index % 4}") for index, (path, text) in enumerate(self._noises())]
        buffer = io.StringIO()
        csv.writer(buffer).writerows([("wav", "text", "speaker"), *rows])
        path = self.folder / f"{name}.csv"
        path.write_text(buffer.getvalue(), encoding="utf-8")
        return str(path)

    def _noises(self) -> Iterator[tuple[str, str]]:
        """Recordings of noise, and texts that are as long as what is said in such a time."""
        rng, generator = random.Random(2), torch.Generator().manual_seed(0)
        for index, seconds in enumerate(self.wanted.lengths(SECONDS)):
            path = self.folder / f"{index}.wav"
            if not path.exists():
                save_wav(path, 0.1 * torch.randn(int(16000 * seconds), generator=generator), 16000)
            yield str(path), _sentences(rng, self.words[:400], max(1, int(2.2 * seconds)))

    def _pictures(self, real: str, image_size: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Entries of a manifest of pictures."""
        found = scan_image_manifest(real, LENIENT).samples if Path(real).exists() else []
        if found:
            chosen = self.wanted.pick(found, lambda row: len(tokenizer.encode(row.values["caption"])))
            return [{**row.values, "image": str(row.path("image").resolve())} for row in chosen]
        rng, entries = random.Random(3), []
        for index, words in enumerate(self.wanted.lengths(CAPTION_WORDS)):
            captions = [" ".join(rng.choices(self.words[:400], k=int(words))) for _ in range(8)]
            picture = self._picture(image_size, index % 8)
            entries.append({"image": picture, "caption": captions[0], "negatives": captions[1:]})
        return entries

    def _picture(self, image_size: int, number: int) -> str:
        path = self.folder / f"{number}.png"
        if not path.exists():
            pixels = np.random.default_rng(number).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        return str(path)

    def _chats(self, ctx_len: int, image_size: int, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
        """Chats about a picture, a recording, both, and about text; the longest fill the context."""
        rng = random.Random(4)
        sounds = list(itertools.islice(self._noises(), self.wanted.num))
        for index, (sound, said) in enumerate(sounds):
            picture = {"type": "image", "image": self._picture(image_size, index % 8)}
            spoken = [{"type": "audio", "audio": sound}, {"type": "text", "text": said}]
            parts = [[picture], spoken, [picture, *spoken], []]
            content = parts[index % 4]
            question = " ".join(rng.choices(self.words[:400], k=12))
            answer = " ".join(rng.choices(self.words[:400], k=ctx_len if self.wanted.longest else 8))
            turns = [
                {"role": "user", "content": [*content, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ]
            task = ("image_qa", "speech_qa", "image_speech_qa", "text_qa")[index % 4]
            yield {"task": task, "messages": turns}

    # ---- inputs ----

    def _thinker(self, path: str) -> Tokenizer:
        """Stage A's checkpoint, and its tokenizer."""
        config, tokenizer = self._known(path, ThinkerConfig, "thinker"), self._tokenizer(path)
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        self._ctx_len, self._thinker_config = config.ctx_len, config
        self._write("thinker", Thinker(config), config, tokenizer)
        return tokenizer

    def _tokenizer(self, path: str) -> Tokenizer:
        """The checkpoint's own; before there is one, one that is learned from the beginning of its text."""
        if Path(path).exists():
            return Tokenizer(as_bytes(load_checkpoint(Path(path))[0]["assets"]["tokenizer.model"]))
        data = read_raw_config(self._config_of(path))["data"]
        size = data.get("vocab_size", 1024)  # the default of stage A
        return Tokenizer.train(self._some_text(256, data["train"], size).splitlines(), size)

    def _audio_encoder(self, path: str, hears: bool = True) -> None:
        """Stage B's checkpoint; untrained it hears anything, or nothing."""
        config = self._known(path, AudioEncoderConfig, "audio_enc")
        model = AudioEncoder(config)
        if not hears:
            with torch.no_grad():
                model.head.bias.view(config.steps_per_state, -1)[:, Characters.blank] = 100.0
        self._write("audio_enc", model, config)

    def _vision(self, path: str, tokenizer: Tokenizer) -> int:
        config = dataclasses.replace(self._known(path, VisionConfig, "vision"), vocab_size=tokenizer.vocab_size)
        self._write("vision", VisionEncoder(config), config, tokenizer)
        return config.image_size

    def _speech(self, path: str, tokenizer: Tokenizer) -> None:
        config = self._known(path, SpeechConfig, "talker")
        if not Path(path).exists():
            own = read_raw_config(self._config_of(path))
            states = "use_thinker_states" in own and own["use_thinker_states"]
            config = filled_in(config, ["voice 0"], self._thinker_config if states else None)
        # its Talker goes on with the tokenizer of the stand-in
        self._write("talker", SpeechModel(config), config, tokenizer)

    def _known(self, path: str, cls: type[Item], kind: str) -> Item:
        """The shape of an input: of its checkpoint, else of the configuration that leads to it."""
        if Path(path).exists():
            return from_dict(cls, read_summary(path)["model_config"], path)
        where = self._config_of(path)
        values = read_raw_config(where)
        return from_dict(cls, values.get("model", {}), f"{where}: model")

    def _config_of(self, path: str) -> Path:
        """The configuration whose run leaves a checkpoint: that of its folder's name."""
        found = self.configs / f"{Path(path).parent.name}.json"
        if not found.exists():
            kind = (
                stage_of(Path(path).stem) if Path(path).stem in ("thinker", "audio_enc", "vision", "talker") else None
            )
            command = f"; run `python {kind.script}` first" if kind else ""
            raise UserError(
                f"{path}: no such checkpoint, and no {found} that would say what it will be, expected one of "
                f"them{command}"
            )
        return found

    def _write(self, kind: str, model: torch.nn.Module, config: Any, tokenizer: Tokenizer | None = None) -> None:
        tensors: dict[str, Any] = {"weights": model.state_dict()}
        lineage = {"tokenizer": tokenizer.hash if tokenizer else None}
        if tokenizer:
            tensors["assets"] = {"tokenizer.model": as_tensor(tokenizer.model)}
        summary = {"kind": kind, "model_config": to_dict(config), "lineage": lineage}
        save_checkpoint(self.folder / f"{kind}.pt", tensors, summary)


def _beginning(path: str | None, least: int, most: int) -> str:
    """Whole lines from the beginning of a text file, or of the files of a folder, up to ``most`` characters.

    Empty where there is none, or fewer than ``least`` characters.
    """
    if path is None or not Path(path).exists():
        return ""
    text = ""
    for file in sorted(Path(path).glob("*.txt")) if Path(path).is_dir() else [Path(path)]:
        with file.open(encoding="utf-8", errors="replace") as stream:
            text += stream.read(most - len(text))
        if len(text) >= most:
            break
    return text[: text.rfind("\n") + 1] if len(text) >= least else ""


def _words(rng: random.Random, count: int = 30_000) -> list[str]:
    """Made-up words of one to four syllables, short ones first."""
    consonants, vowels = "bdfghklmnprstvwz", "aeiou"
    syllables = [first + vowel for first in consonants for vowel in vowels]
    found: dict[str, None] = {}
    for length in (1, 2, 3, 4):
        wanted = min(count, math.ceil(count * length**2 / 10), len(syllables) ** length // 2)
        while len(found) < wanted:
            found["".join(rng.choices(syllables, k=length)) + rng.choice(["", "", "n", "s"])] = None
    return list(found)


def _sentences(rng: random.Random, words: Sequence[str], num_words: int) -> str:
    """So many words in sentences of ten."""
    drawn = rng.choices(words, k=num_words)
    return ". ".join(" ".join(drawn[start : start + 10]) for start in range(0, num_words, 10)) + "."
