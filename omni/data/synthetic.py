"""The embedded data set: one small world as text, speech, pictures and chats, from a seed and offline.

`synthesize("nano", Path("data"))` writes `data/nano/{text,audio,images,sft}` and, last, `world.json`: where it stands,
the folder is whole. Everything depends on (size, seed) alone: each file is the same, byte for byte, on every run.
"""

from __future__ import annotations

import io
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from omni.data.chats import Picture
from omni.data.drawing import draw
from omni.data.espeak import JUDGE_VOICES, UNSEEN_VOICES, require, speak_all
from omni.data.holdouts import check
from omni.data.recordings import as_csv
from omni.data.world import PLACES, World
from omni.data.world_plan import SIZES, Plan, make_plan

VERSION = 22  # of what is written: raise it with every change that alters a byte


def synthesize(size: str, out: Path, seed: int = 0, processes: int | None = None) -> dict[str, Any]:
    """Write the micro-world of a size into `out/<size>` and return what `world.json` says of it.

    A folder that is whole already is left alone (`"created": False` in the result); a half-written one is written anew.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r}: expected one of {', '.join(SIZES)}")
    started, folder = time.perf_counter(), Path(out) / size
    mark = folder / "world.json"
    found = _read_mark(mark)
    if found is not None and (found["version"], found["size"], found["seed"]) == (VERSION, size, seed):
        return found | {"created": False, "folder": str(folder), "seconds": time.perf_counter() - started}
    require()
    mark.unlink(missing_ok=True)
    for part in ("text", "audio/wavs", "images/png", "sft"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    plan = make_plan(SIZES[size], seed, folder)
    with speak_all(plan.recorder.jobs, processes) as speaking:  # in other processes, while this one draws and writes
        _write_pictures(plan, folder / "images")
        _write_texts(plan, folder)
        spoken = speaking.wait()
    for name, rows in plan.speech.items():
        _write(folder / "audio" / f"{name}.csv", as_csv(rows))
    _remove_strays(folder, plan)
    seconds = {str(Path(path).relative_to(folder.absolute() / "audio")): length for path, length in spoken.items()}
    check(folder, plan.world, set(plan.voices))
    summary = _summary(plan, size, seconds)
    _write(mark, json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return summary | {"created": True, "folder": str(folder), "seconds": time.perf_counter() - started}


# ---------------------------------------------------------------------------------------------------------- the writing


def _write(path: Path, content: str | bytes) -> None:
    """Let a file appear whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)  # noqa: PTH105 - the same call everywhere that files must appear whole


def _write_texts(plan: Plan, folder: Path) -> None:
    """Write the documents and the chats."""
    for split, documents in plan.texts.items():
        _write(folder / "text" / f"{split}.txt", "\n\n".join(documents) + "\n")
    for split, lines in plan.chats.items():
        _write(folder / "sft" / f"sft_{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _write_pictures(plan: Plan, folder: Path) -> None:
    """Draw the scenes and write their captions, right and wrong."""
    for name, pictures in plan.pictures.items():
        entries = []
        for picture in pictures:
            rng = plan.rng(f"drawing/{picture.image}")
            buffer = io.BytesIO()
            draw(picture.scene, rng).save(buffer, "PNG", compress_level=1)  # noise: more effort saves 3 %
            _write(folder / picture.image, buffer.getvalue())
            entries.append(_annotation(plan.world, rng, name, picture))
        _write(folder / f"annotations_{name}.json", "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")


def _annotation(world: World, rng: random.Random, name: str, picture: Picture) -> dict[str, Any]:
    """Return one entry of a manifest of pictures."""
    scene, caption = picture.scene, picture.caption
    things = [
        {"colour": thing.colour, "shape": thing.shape, "size": thing.size, "place": PLACES[thing.place]}
        for thing in scene
    ]
    entry: dict[str, Any] = {"image": picture.image, "caption": caption.text, "scene": {"objects": things}}
    if name == "train":
        wrong = world.wrong_captions(rng, caption, scene, "train")
        more = world.wrong_captions(rng, caption, scene, "train", kinds=(rng.choice(("colour", "shape")),))
        rest = [kind for kind in wrong if kind not in ("colour", "shape")]
        dropped = rng.choice(rest) if len(rest) > 1 else None
        entry["negatives"] = sorted({text for kind, text in wrong.items() if kind != dropped} | set(more.values()))
        rng.shuffle(entry["negatives"])
    else:
        combination = name == "test_combinations"
        focus = world.held_out_things(scene) if combination else ()
        entry["swaps"] = world.wrong_captions(rng, caption, scene, "any" if combination else name, prefer=focus)
    return entry


def _remove_strays(folder: Path, plan: Plan) -> None:
    """Remove recordings and pictures that an earlier version or seed left in the folder."""
    ours = {Path(job.path).name for job in plan.recorder.jobs}
    ours |= {Path(picture.image).name for pictures in plan.pictures.values() for picture in pictures}
    for part, pattern in (("audio/wavs", "*.wav*"), ("images/png", "*.png*")):
        for path in (folder / part).glob(pattern):
            if path.name not in ours:
                path.unlink()


def _read_mark(mark: Path) -> dict[str, Any] | None:
    """Return what the mark of completeness says, if it stands and can be read."""
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
        return found if {"version", "size", "seed"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _summary(plan: Plan, size: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Say what was made and what is held out."""
    world = plan.world
    tasks: dict[str, dict[str, int]] = {}
    for split, lines in plan.chats.items():
        for line in lines:
            name = line["task"] + ("_unseen_combinations" if line["held_out"] == "combination" else "")
            tasks.setdefault(split, {})[name] = tasks.setdefault(split, {}).get(name, 0) + 1
    return {
        "version": VERSION,
        "size": size,
        "seed": world.seed,
        "documents": {split: len(documents) for split, documents in plan.texts.items()},
        "text_bytes": {split: sum(len(text) + 2 for text in documents) for split, documents in plan.texts.items()},
        "recordings": {name: len(rows) for name, rows in plan.speech.items()},
        "speech_minutes": {
            name: round(sum(seconds[row.wav] for row in rows) / 60, 2) for name, rows in plan.speech.items()
        },
        "pictures": {name: len(pictures) for name, pictures in plan.pictures.items()},
        "chats": tasks,
        "voices": {"train": plan.voices, "tts": plan.tts_voices, "unseen": UNSEEN_VOICES, "judge": JUDGE_VOICES},
        "held_out": {
            "pairs": sorted(world.pairs),
            "placed": sorted(world.placed),
            "related": sorted(world.related),
            "operands": sorted(world.operands),
            "words": sorted(world.heldout_words),
        },
    }
