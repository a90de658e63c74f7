"""The embedded data set: one small world as text, speech, pictures and chats, from a seed and offline.

`synthesize("nano", Path("data"))` writes `data/nano/{text,audio,images,sft}` and, last, `world.json`: where that stands, the
folder is whole. What is drawn depends on (size, seed) alone, and every file is the same, byte for byte, on every run.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.data.chats import Chats, Picture, unit
from omni.data.drawing import draw
from omni.data.espeak import TRAIN_VOICES, UNSEEN_VOICES, speak_all
from omni.data.holdouts import check
from omni.data.recordings import Recorder, Recording, turns_of
from omni.data.stories import document, free_sentence, grammar_sentence, unheard_sentence, units
from omni.data.world import PLACES, World

VERSION = 1  # of what is written: raise it with every change that alters a byte


@dataclass(frozen=True)
class Size:
    """How much of everything; validation parts follow from the test parts."""

    text_bytes: int
    images: int
    images_test: int  # of seen combinations, and as many of held-out ones
    tts_train: int  # recordings in the Talker's voices, all of them in asr_train too
    tts_voices: int
    asr_free: int  # outside the grammar
    asr_grammar: int
    asr_test: int
    tts_test: int
    image_chats: int  # of four questions
    captions: int
    speech_qa: int
    image_speech_qa: int
    picture_recordings: int  # spoken questions that the image_speech_qa chats share
    asr: int
    text_qa: int
    text_chat: int
    speech_out: int
    chats_test: int  # a task
    spoken_test: int  # a task with recordings of its own
    heldout_words: int = 60
    voices: int = 48


SIZES = {
    "test": Size(30_000, 60, 24, 16, 2, 12, 4, 8, 6, 20, 4, 12, 6, 4, 6, 30, 6, 4, 20, 10, 20, 6),
    "nano": Size(1_750_000, 5_000, 300, 900, 4, 350, 100, 150, 100, 1_500, 300, 700, 350, 150, 400, 2_500, 400, 150, 120, 100),
    "micro": Size(
        6_000_000, 16_000, 300, 3_600, 16, 1_700, 800, 300, 200, 5_000, 1_000, 2_400, 1_200, 300, 1_400, 9_000, 1_400, 500, 240,
        200, 150,
    ),
    "tiny": Size(
        30_000_000, 60_000, 500, 10_000, 16, 7_000, 4_000, 600, 300, 15_000, 3_000, 7_000, 3_500, 1_000, 4_000, 25_000, 4_000,
        1_500, 500, 400, 150,
    ),
}  # fmt: skip


@dataclass
class Plan:
    """Everything that will be written, before a sound is made or a picture is drawn."""

    world: World
    size: Size
    recorder: Recorder
    avoid: set[str] = field(default_factory=set)  # what the tests say, normalized: training says none of it
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    speech: dict[str, list[Recording]] = field(default_factory=dict)
    chats: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def voices(self) -> list[str]:
        """The voices of training; the Talker's come first."""
        return TRAIN_VOICES[: self.size.voices]

    @property
    def tts_voices(self) -> list[str]:
        """The voices in which the Talker learns to speak."""
        return TRAIN_VOICES[: self.size.tts_voices]

    def rng(self, purpose: str) -> random.Random:
        """Return a generator of its own for each purpose, so that one part's size alters no other part."""
        return random.Random(f"{self.world.seed}/{purpose}")


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
    mark.unlink(missing_ok=True)
    for part in ("text", "audio/wavs", "images/png", "sft"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    plan = make_plan(SIZES[size], seed, folder)
    with speak_all(plan.recorder.jobs, processes) as speaking:  # in other processes, while this one draws and writes
        _write_pictures(plan, folder / "images")
        _write_texts(plan, folder)
        spoken = speaking.wait()
    for name, rows in plan.speech.items():
        _write(folder / "audio" / f"{name}.csv", _csv(rows))
    _remove_strays(folder, plan)
    seconds = {str(Path(path).relative_to(folder.absolute() / "audio")): length for path, length in spoken.items()}
    check(folder, plan.world, set(plan.voices))
    summary = _summary(plan, size, seconds)
    _write(mark, json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return summary | {"created": True, "folder": str(folder), "seconds": time.perf_counter() - started}


def make_plan(size: Size, seed: int, folder: Path) -> Plan:
    """Draw all that is to be written: the tests first, so that training can keep clear of what they say."""
    plan = Plan(World(seed, size.heldout_words), size, Recorder(folder / "audio", seed))
    count = size.images_test
    plan.pictures["test"] = _pictures(plan, "test", count, distinct=True)
    plan.pictures["test_combinations"] = _pictures(plan, "test_combinations", count, distinct=True)
    plan.pictures["val"] = _pictures(plan, "val", count * 2 // 3, distinct=True)
    plan.pictures["train"] = _pictures(plan, "train", size.images, distinct=False)
    _plan_test_speech(plan)
    for split in ("test", "val"):
        plan.chats[split] = _test_chats(plan, split)
        plan.avoid |= {unit(text) for line in plan.chats[split] for text in _test_questions(line)}
    plan.avoid |= {unit(picture.caption.text) for name in ("test", "val") for picture in plan.pictures[name]}
    plan.avoid |= {unit(row.text) for rows in plan.speech.values() for row in rows}
    _plan_training(plan)
    for split, share in (("val", 0.03), ("test", 0.06), ("train", 1.0)):
        plan.texts[split] = _documents(plan, split, int(size.text_bytes * share))
    return plan


# ------------------------------------------------------------------------------------------------------------ the parts


def _pictures(plan: Plan, name: str, count: int, distinct: bool) -> list[Picture]:
    """Draw scenes with captions; `distinct`: no caption describes two of them, in whatever form."""
    rng, combination = plan.rng(f"pictures/{name}"), name == "test_combinations"
    split = "test" if combination else name
    pictures: list[Picture] = []
    alike: dict[tuple[str, ...], list[Picture]] = {}
    while len(pictures) < count:
        scene, caption = plan.world.draw_described(rng, split, combination)
        others = alike.setdefault(tuple(sorted(thing.full_name for thing in scene)), [])
        if distinct and any(caption.fits(other.scene) or other.caption.fits(scene) for other in others):
            continue
        pictures.append(Picture(f"png/{name}_{len(pictures):06d}.png", scene, caption))
        others.append(pictures[-1])
    return pictures


def _plan_test_speech(plan: Plan) -> None:
    """Choose the sentences and voices of the validation and test recordings."""
    size, world = plan.size, plan.world
    rng = plan.rng("speech/test")
    spoken: set[str] = set()

    def new(make: Callable[[], str]) -> str:
        while unit(text := make()) in spoken:
            pass
        spoken.add(unit(text))
        return text

    def grammar(split: str, limits: tuple[int, int]) -> str:
        return new(lambda: grammar_sentence(world, rng, split, *limits))

    def rows(name: str, voices: Sequence[str], texts: Iterable[str], vary: bool) -> None:
        speaker = turns_of(voices, plan.rng(f"voices/{name}"))
        plan.speech[name] = [plan.recorder.record(name, text, next(speaker), vary) for text in texts]

    def heard(count: int, split: str) -> list[str]:
        free = [new(lambda: free_sentence(world, rng, shortest=2)) for _ in range(count * 2 // 5)]
        texts = free + [grammar(split, (3, 18)) for _ in range(count - len(free))]
        rng.shuffle(texts)
        return texts

    rows("asr_val", plan.voices, heard(min(max(size.asr_test * 3 // 7, 4), 200), "val"), vary=True)
    rows("asr_test", plan.voices, heard(size.asr_test, "test"), vary=True)
    rows("asr_test_voices", UNSEEN_VOICES, heard(size.asr_test * 2 // 3, "test"), vary=True)
    lengths = ((3, 5), (6, 15), (16, 30))
    rows("tts_val", plan.tts_voices, [grammar("val", lengths[i % 3]) for i in range(size.tts_test // 3)], vary=False)
    rows("tts_test", plan.tts_voices, [grammar("test", lengths[i % 3]) for i in range(size.tts_test)], vary=False)
    words = sorted(world.heldout_words) * 4
    rng.shuffle(words)
    unheard = [unheard_sentence(world, rng, words[2 * i : 2 * i + 2]) for i in range(size.tts_test // 2)]
    rows("tts_test_words", plan.tts_voices, unheard, vary=False)
    rows(
        "tts_test_voices",
        UNSEEN_VOICES,
        [grammar("test", lengths[i % 2]) for i in range(size.tts_test // 2)],
        vary=False,
    )


def _test_chats(plan: Plan, split: str) -> list[dict[str, Any]]:
    """Ask one question a line; the validation part is a quarter of the test's."""
    size, share = plan.size, 1 if split == "test" else 4
    count, spoken = size.chats_test // share, size.spoken_test // share
    chats = Chats(
        plan.world, plan.recorder, split, turns_of(plan.voices, plan.rng(f"voices/chats/{split}")), plan.avoid
    )
    chats.text_chat(count)
    chats.text_qa(count)
    chats.caption(plan.pictures[split][:count])
    chats.image_qa(plan.pictures[split], count)
    if split == "test":
        chats.image_qa(plan.pictures["test_combinations"], count, combination=True)
    chats.asr(plan.speech[f"asr_{split}"][:spoken])
    chats.speech_qa(spoken)
    chats.image_speech_qa(plan.pictures[split], spoken, spoken)
    chats.speech_out(spoken, None)
    return chats.lines


def _test_questions(line: dict[str, Any]) -> list[str]:
    """Return what training may not say: not the questions about pictures, which are few and asked of many."""
    if line["task"] in ("text_qa", "text_chat"):
        return [str(line["messages"][0]["content"])]
    if line["task"] == "speech_out" and "transcript" not in line:
        return [str(line["messages"][0]["content"]).removesuffix(" answer aloud.")]
    return [line["transcript"]] if line["task"] in ("speech_qa", "asr", "speech_out") else []


def _plan_training(plan: Plan) -> None:
    """Choose what training hears: the Talker's sentences, free speech, the grammar's, and the chats' questions."""
    size, world, rng = plan.size, plan.world, plan.rng("speech/train")
    tts: list[Recording] = []
    tts_speaker = turns_of(plan.tts_voices, plan.rng("voices/tts_train"))
    speaker = turns_of(plan.voices, plan.rng("voices/train"))

    def new(make: Callable[[], str]) -> str:
        while units(text := make()) & plan.avoid:
            pass
        return text

    def answer_in(text: str) -> Recording:
        tts.append(plan.recorder.record("tts", text, next(tts_speaker), vary=False))
        return tts[-1]

    def limits() -> tuple[int, int]:
        return rng.choices(((1, 18), (6, 15), (16, 30)), (6, 2, 1))[0]

    chats = Chats(world, plan.recorder, "train", turns_of(plan.voices, plan.rng("voices/chats/train")), plan.avoid)
    chats.speech_qa(size.speech_qa)
    chats.speech_out(size.speech_out, answer_in)
    for i in range(size.tts_train - size.speech_out):
        free = i % 4 == 0
        answer_in(
            new(lambda: free_sentence(world, rng))
            if free
            else new(lambda: grammar_sentence(world, rng, "train", *limits()))
        )
    free_speech = [new(lambda: free_sentence(world, rng)) for _ in range(size.asr_free)]
    free_speech += [new(lambda: grammar_sentence(world, rng, "train", 3, 15)) for _ in range(size.asr_grammar)]
    heard = [plan.recorder.record("train", text, next(speaker)) for text in free_speech]
    chats.asr(rng.sample(heard + tts, size.asr))
    pictures = plan.pictures["train"]
    chats.image_chats(pictures[: size.image_chats])
    chats.caption(pictures[size.image_chats :][: size.captions])
    chats.image_speech_qa(pictures[size.image_chats + size.captions :], size.image_speech_qa, size.picture_recordings)
    chats.text_qa(size.text_qa)
    chats.text_chat(size.text_chat)
    rng.shuffle(chats.lines)
    plan.chats["train"] = chats.lines
    plan.speech["tts_train"] = tts
    questions = [recording for _, recording in chats.spoken] + chats.picture_recordings
    plan.speech["asr_train"] = rng.sample(every := tts + heard + questions, len(every))


def _documents(plan: Plan, split: str, num_bytes: int) -> list[str]:
    """Draw documents of stage A; those of training are none of the others, and say nothing that a test says."""
    rng = plan.rng(f"text/{split}")
    others = {text for documents in plan.texts.values() for text in documents}
    documents: list[str] = []
    total = 0
    while total < num_bytes:
        text = document(plan.world, rng, split)
        if text in others or split == "train" and units(text) & plan.avoid:
            continue
        documents.append(text)
        total += len(text) + 2
    return documents


# ---------------------------------------------------------------------------------------------------------- the writing


def _write(path: Path, content: str | bytes) -> None:
    """Let a file appear whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)  # noqa: PTH105 - the same call everywhere that files must appear whole


def _csv(rows: Sequence[Recording]) -> str:
    """Return a manifest of recordings."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("wav", "text", "speaker"))
    writer.writerows((row.wav, row.text, row.speaker) for row in rows)
    return buffer.getvalue()


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
        "voices": {"train": plan.voices, "tts": plan.tts_voices, "unseen": UNSEEN_VOICES},
        "held_out": {
            "pairs": sorted(world.pairs),
            "placed": sorted(world.placed),
            "related": sorted(world.related),
            "operands": sorted(world.operands),
            "words": sorted(world.heldout_words),
        },
    }
