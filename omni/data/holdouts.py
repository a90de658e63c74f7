"""Reads a written micro-world back and asserts that nothing held out stands in its training or validation part."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omni.data.espeak import UNSEEN_VOICES
from omni.data.lexicon import COLOURS, NUMBER_NAMES, PLACES, RELATIONS, SHAPES, SIZES
from omni.data.stories import units
from omni.data.world import Caption, Clause, Thing, World, normalize

_NAME = rf"(?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
_TOKEN = re.compile(rf"{_NAME}|(?P<place>{'|'.join(PLACES)})|(?P<relation>{'|'.join(RELATIONS)})|(?P<stop>[.?])")
_NUMBER = rf"({'|'.join(sorted(NUMBER_NAMES, key=len, reverse=True))}|\d+)\b"
_OPERANDS = re.compile(rf"\b{_NUMBER} (?:plus|minus|and) {_NUMBER}|\b{_NUMBER} away from {_NUMBER}")


def parse(text: str) -> Iterator[Clause]:
    """Yield what sentences say about coloured shapes, in whatever form; a thing alone has place -1."""
    things: list[Thing] = []
    place: int | None = None  # said before the thing, as in "at the top left a big red circle"
    how: str | None = None
    for match in _TOKEN.finditer(text):
        if match["stop"]:
            things, place, how = [], None, None
        elif match["relation"]:
            how = match["relation"]
        elif match["place"]:
            if things and things[-1].place < 0 and place is None:
                thing = things[-1]
                yield Clause(Thing(PLACES.index(match["place"]), thing.colour, thing.shape, thing.size))
                things = []
            else:
                place = PLACES.index(match["place"])
        else:
            thing = Thing(-1, match["colour"], match["shape"], match["size"] or "")
            if how is not None and things:
                yield Clause(things[-1], how, thing)
                things, how = [], None
            elif place is not None:
                yield Clause(Thing(place, thing.colour, thing.shape, thing.size))
                place = None
            else:
                yield Clause(thing)
                things = [thing]


def check(folder: Path, world: World, train_voices: set[str]) -> None:
    """Raise with every violation found in the manifests of a folder."""
    problems: list[str] = []
    for split in ("train", "val"):
        for where, text in said(folder, split):
            problems += [f"{where}: {problem}: {text[:200]!r}" for problem in violations(world, text)]
        for entry in json.loads((folder / "images" / f"annotations_{split}.json").read_text(encoding="utf-8")):
            if world.held_out_things(scene_of(entry)):
                problems.append(f"annotations_{split}.json: {entry['image']} shows a held-out combination")
    for entry in json.loads((folder / "images" / "annotations_test_combinations.json").read_text(encoding="utf-8")):
        if not world.held_out_things(scene_of(entry)):
            problems.append(f"annotations_test_combinations.json: {entry['image']} shows no held-out combination")
    trained = set().union(*(units(text) for _, text in said(folder, "train")))
    problems += [
        f"{where}: training says it too: {text!r}" for where, text in test_sentences(folder) if text in trained
    ]
    for name in ("asr_train", "asr_val", "asr_test", "tts_train", "tts_val", "tts_test", "tts_test_shuffled"):
        strangers = {row["speaker"] for row in read_csv(folder / "audio" / f"{name}.csv")} - train_voices
        problems += [f"{name}.csv: voice {voice} is held out" for voice in sorted(strangers)]
    for name in ("asr_test_voices", "tts_test_voices"):
        known = {row["speaker"] for row in read_csv(folder / "audio" / f"{name}.csv")} & train_voices
        problems += [f"{name}.csv: voice {voice} is heard in training" for voice in sorted(known)]
    if (folder / "audio" / "judge_train.csv").exists():
        problems += _judge_problems(folder, world, train_voices)
    if problems:
        shown = "\n".join(problems[:20])
        raise RuntimeError(f"the micro-world breaks its own split in {len(problems)} places:\n{shown}")


def _judge_problems(folder: Path, world: World, train_voices: set[str]) -> list[str]:
    """What the judge of speech output shares with those it grades, or says of what is held out."""
    stages = [row for name in ("asr_train", "tts_train") for row in read_csv(folder / "audio" / f"{name}.csv")]
    texts, tests = {row["text"] for row in stages}, {text for _, text in test_sentences(folder)}
    found = []
    for name in ("judge_train", "judge_val"):
        for row in read_csv(folder / "audio" / f"{name}.csv"):
            found += [f"{name}.csv: {problem}: {row['text']!r}" for problem in violations(world, row["text"])]
            if row["text"] in texts or units(row["text"]) & tests:
                found.append(f"{name}.csv: another set says it too: {row['text']!r}")
            if row["speaker"] in train_voices or row["speaker"] in UNSEEN_VOICES:
                found.append(f"{name}.csv: voice {row['speaker']} is heard elsewhere")
    return found


def violations(world: World, text: str) -> list[str]:
    """Return what a text says of what is held out."""
    found = [f"held-out word {word!r}" for word in sorted(world.heldout_words & set(normalize(text).split()))]
    for match in _OPERANDS.finditer(text):
        a, b = (int(part) if part.isdigit() else NUMBER_NAMES[part] for part in match.groups() if part is not None)
        if world.operands_held_out(a, b):
            found.append(f"held-out operands {a} and {b}")
    for sentence in re.split(r"[.?]", text):
        clauses = tuple(parse(sentence))
        alone = [clause for clause in clauses if clause.other is None and clause.thing.place < 0]
        if any((clause.thing.colour, clause.thing.shape) in world.pairs for clause in alone):
            found.append("held-out pair")
        stated = tuple(clause for clause in clauses if clause not in alone)
        if stated and world.caption_held_out(Caption(stated, 0)):
            found.append("held-out combination")
    return found


def scene_of(entry: dict[str, Any]) -> tuple[Thing, ...]:
    """Return the scene of an annotation."""
    things = (Thing(PLACES.index(o["place"]), o["colour"], o["shape"], o["size"]) for o in entry["scene"]["objects"])
    return tuple(sorted(things))


def said(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    """Yield (file, text) of all that a split says: documents, transcripts, captions and turns."""
    for document in (folder / "text" / f"{split}.txt").read_text(encoding="utf-8").split("\n\n"):
        for turn in re.split(r"<\|\w+\|>", document):
            yield "text", turn
    for name in (f"asr_{split}", f"tts_{split}"):
        yield from ((f"{name}.csv", row["text"]) for row in read_csv(folder / "audio" / f"{name}.csv"))
    for entry in json.loads((folder / "images" / f"annotations_{split}.json").read_text(encoding="utf-8")):
        wrong: Iterable[str] = entry.get("negatives") or entry.get("swaps", {}).values()
        yield from ((f"annotations_{split}.json", text) for text in (entry["caption"], *wrong))
    for line in read_lines(folder / "sft" / f"sft_{split}.jsonl"):
        for text in (line.get("transcript", ""), *(part for message in line["messages"] for part in texts_of(message))):
            yield f"sft_{split}.jsonl", text


def test_sentences(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, normalized text) of what only the tests may say; questions about pictures are asked everywhere."""
    for name in ("asr_test", "asr_test_voices", "tts_test", "tts_test_shuffled", "tts_test_words", "tts_test_voices"):
        yield from ((f"{name}.csv", normalize(row["text"])) for row in read_csv(folder / "audio" / f"{name}.csv"))
    for name in ("test", "test_combinations"):
        entries = json.loads((folder / "images" / f"annotations_{name}.json").read_text(encoding="utf-8"))
        yield from ((f"annotations_{name}.json", normalize(entry["caption"])) for entry in entries)
    for line in read_lines(folder / "sft" / "sft_test.jsonl"):
        if line["task"] in ("text_qa", "speech_qa", "speech_out", "asr"):
            asked = line.get("transcript") or " ".join(texts_of(line["messages"][0]))
            yield "sft_test.jsonl", normalize(asked.removeprefix("scene: "))


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a manifest of recordings."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the chats of a manifest."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts_of(message: dict[str, Any]) -> list[str]:
    """Return the text parts of a message."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
