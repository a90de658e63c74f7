"""The micro-world: the same from a seed, true to its scenes, balanced, and without a leak across its splits."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from omni.config import UserError
from omni.data import espeak
from omni.data.holdouts import check
from omni.data.lexicon import grammar_words, lexicon
from omni.data.primer import FIVE_LESSONS, TWO_LESSONS, lesson_at, primer_document
from omni.data.recordings import Recorder
from omni.data.synthetic import synthesize
from omni.data.world import World
from omni.data.world_plan import SIZES, Plan, make_plan

COLOURS = "red green blue yellow purple orange white black".split()  # noqa: SIM905
SHAPES = "circle square triangle star cross ring".split()  # noqa: SIM905
CELLS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
THING = rf"an? (?:(big|small) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
COUNTED = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
for ten in "twenty thirty forty fifty sixty seventy eighty ninety".split():  # noqa: SIM905
    COUNTED += [ten, *(f"{ten} {one}" for one in COUNTED[1:10])]
NUMBERS = COUNTED[:21]
NUMBER = "|".join(sorted(COUNTED, key=len, reverse=True)) + r"|\d+"

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra `synth` (espeak-ng)"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    summary = synthesize("test", out, processes=2)
    assert summary["created"]
    return out / "test"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A larger plan without a sound: enough questions to judge their balance."""
    size = replace(SIZES["nano"], text_bytes=100_000, images=900, image_chats=500, text_qa=900, chats_test=120)
    return make_plan(size, 0, tmp_path_factory.mktemp("plan"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def chats(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def annotations(world: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((world / "images" / f"annotations_{name}.json").read_text(encoding="utf-8"))


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def parts(line: dict[str, Any], kind: str) -> list[str]:
    found = []
    for message in line["messages"]:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        found += [part[kind] for part in content if part["type"] == kind]
    return found


# --------------------------------------------------------------------------------------------------------- as a whole


@needs_espeak
def test_same_bytes_from_a_seed(world: Path, tmp_path: Path) -> None:
    """One worker or two, an empty folder or a half-written one: the same files."""
    (tmp_path / "test" / "audio" / "wavs").mkdir(parents=True)
    (tmp_path / "test" / "audio" / "wavs" / "old_00000.wav").write_bytes(b"left behind")
    (tmp_path / "test" / "world.json").write_text('{"version": 0}')
    synthesize("test", tmp_path, processes=1)
    first = {path.relative_to(world): path.read_bytes() for path in world.rglob("*") if path.is_file()}
    again = tmp_path / "test"
    second = {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}
    assert first.keys() == second.keys()
    assert [str(name) for name in first if first[name] != second[name]] == []


@needs_espeak
def test_a_whole_folder_is_left_alone(world: Path) -> None:
    stamp = (world / "world.json").stat().st_mtime_ns
    summary = synthesize("test", world.parent)
    assert summary["created"] is False
    assert summary["seconds"] < 0.5
    assert (world / "world.json").stat().st_mtime_ns == stamp


@needs_espeak
def test_every_file_is_there_and_loads(world: Path) -> None:
    used = set()
    for manifest in sorted((world / "audio").glob("*.csv")):
        for row in rows(manifest):
            samples, rate = soundfile.read(manifest.parent / row["wav"], dtype="int16")
            assert rate == 16_000 and samples.ndim == 1 and 0.3 < len(samples) / rate < 15
            assert re.fullmatch(r"[a-z.,?' ]+", row["text"])
            loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
            assert 0.05 < loud[0] / rate < 0.12 and 0.05 < 1 - (loud[-1] - len(samples) + rate) / rate < 0.2
            used.add(Path(row["wav"]).name)
    for name in ("train", "val", "test", "test_combinations"):
        for entry in annotations(world, name):
            with Image.open(world / "images" / entry["image"]) as picture:
                assert picture.size == (64, 64) and picture.mode == "RGB"
    for split in ("train", "val", "test"):
        assert "\n\n\n" not in (world / "text" / f"{split}.txt").read_text(encoding="utf-8")
        for line in chats(world / "sft" / f"sft_{split}.jsonl"):
            for path in parts(line, "image") + parts(line, "audio"):
                assert (world / "sft" / path).is_file()
                used.add(Path(path).name)
    assert {path.name for path in (world / "audio" / "wavs").iterdir()} <= used


@needs_espeak
def test_speech_manifests_fit_together(world: Path) -> None:
    table = {path.stem: rows(path) for path in (world / "audio").glob("*.csv")}
    heard = {row["wav"] for row in table["asr_train"]}
    assert 0 < len({row["wav"] for row in table["tts_train"]} & heard) <= len(heard) / 5
    assert {f"wavs/{path.name}" for path in (world / "audio" / "wavs").glob("train_*.wav")} <= heard
    known = {row["speaker"] for row in table["asr_train"]}
    assert {row["speaker"] for name in ("asr_test", "tts_test", "tts_train") for row in table[name]} <= known
    for name in ("asr_test_voices", "tts_test_voices"):
        assert not {row["speaker"] for row in table[name]} & known
    by_file = {row["wav"]: row["text"] for row in table["tts_train"]}
    spoken = [line for line in chats(world / "sft" / "sft_train.jsonl") if line["task"] == "speech_out"]
    assert spoken
    for line in spoken:  # the answer's recording says the answer
        assert by_file[line["answer_audio"].removeprefix("../audio/")] == line["messages"][-1]["content"]


# ----------------------------------------------------------------------------------------------------------- hold-outs


@needs_espeak
def test_nothing_held_out_is_in_training(world: Path) -> None:
    held_out = json.loads((world / "world.json").read_text())["held_out"]
    texts = [(world / "text" / f"{split}.txt").read_text() for split in ("train", "val")]
    for split in ("train", "val"):
        texts += [row["text"] for name in ("asr", "tts") for row in rows(world / "audio" / f"{name}_{split}.csv")]
        texts += [str(list(entry.values())) for entry in annotations(world, split)]
        texts += [json.dumps(line) for line in chats(world / "sft" / f"sft_{split}.jsonl")]
    everything = "\n".join(texts)
    for colour, shape in held_out["pairs"]:
        assert f"{colour} {shape}" not in everything
        assert f"'colour': '{colour}', 'shape': '{shape}'" not in everything
    for a, b in held_out["operands"]:
        for x, y in ((a, b), (b, a)):
            for first, second in ((COUNTED[x], COUNTED[y]), (str(x), str(y))):
                # "thirty" is not what is meant in "thirty six"
                ends = rf"\b(?! ({'|'.join(COUNTED[1:10])})\b)" if second in COUNTED[20::10] else r"\b"
                assert not re.search(rf"\b{first} (plus|minus|and|away from) {second}{ends}", everything)
    assert not set(words(everything).split()) & set(held_out["words"])
    scenes = [entry["scene"]["objects"] for split in ("train", "val") for entry in annotations(world, split)]
    for scene in scenes:
        for thing in scene:
            assert [thing["colour"], thing["shape"], thing["place"]] not in held_out["placed"]
            for other in scene:
                how = relation(thing, other)
                assert how is None or [thing["colour"], thing["shape"], how] not in held_out["related"]


@needs_espeak
def test_training_says_no_sentence_of_the_tests(world: Path) -> None:
    text = (world / "text" / "train.txt").read_text()
    told = {words(turn.removeprefix("scene: ")) for turn in re.split(r"<\|\w+\|>|\n", text)}
    told |= {words(sentence) for sentence in re.split(r"[.?\n]|<\|\w+\|>", text)}
    for name in ("asr_train", "tts_train"):
        told |= {words(row["text"]) for row in rows(world / "audio" / f"{name}.csv")}
    told |= {words(entry["caption"]) for entry in annotations(world, "train")}
    for line in chats(world / "sft" / "sft_train.jsonl"):
        told |= {words(part.removeprefix("scene: ")) for part in parts(line, "text")}
    for name in ("asr_test", "asr_test_voices", "tts_test", "tts_test_words", "tts_test_voices", "tts_test_shuffled"):
        assert not told & {words(row["text"]) for row in rows(world / "audio" / f"{name}.csv")}
    for name in ("test", "test_combinations"):
        captions = [words(entry["caption"]) for entry in annotations(world, name)]
        assert len(set(captions)) == len(captions)
        assert not told & set(captions)
    for line in chats(world / "sft" / "sft_test.jsonl"):
        if line["task"] in ("text_qa", "speech_qa"):
            asked = line.get("transcript") or parts(line, "text")[0].removeprefix("scene: ")
            assert words(asked) not in told


@needs_espeak
@pytest.mark.parametrize("leak", ["pair", "operands", "word", "sentence"])
def test_the_check_finds_a_leak(world: Path, tmp_path: Path, leak: str) -> None:
    made = World(0, SIZES["test"].heldout_words)
    colour, shape = sorted(made.pairs)[0]
    a, b = sorted(made.operands)[3]
    leaks = {
        "pair": f"there is a big {colour} {shape} at the top left.",
        "operands": f"{COUNTED[b]} plus {COUNTED[a]} is {a + b}.",
        "word": f"the word is {sorted(made.heldout_words)[0]}.",
        "sentence": rows(world / "audio" / "asr_test.csv")[0]["text"],
    }
    folder = shutil.copytree(world, tmp_path / "copy", ignore=shutil.ignore_patterns("*.wav", "*.png"))
    check(folder, made, set(espeak.TRAIN_VOICES))
    with (folder / "text" / "train.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n{leaks[leak]}\n")
    with pytest.raises(RuntimeError, match=r"held-out|training says it too"):
        check(folder, made, set(espeak.TRAIN_VOICES))


def test_held_out_words_are_in_no_sentence_of_the_grammar() -> None:
    assert len(lexicon()) == len(set(lexicon())) >= 1500
    assert all(re.fullmatch(r"[a-z]+", word) for word in lexicon())
    names = {name for name in World(0).heldout_words if name not in lexicon()}
    assert not (World(0).heldout_words - names) & grammar_words()
    assert not set(World(0).names) & World(0).heldout_words


# ------------------------------------------------------------------------------------------------- scenes and questions


def relation(first: dict[str, str], second: dict[str, str]) -> str | None:
    (row, column), (other_row, other_column) = CELLS[first["place"]], CELLS[second["place"]]
    if column == other_column and row != other_row:
        return "above" if row < other_row else "below"
    if row == other_row and column != other_column:
        return "left of" if column < other_column else "right of"
    return None


def says(caption: str, scene: list[dict[str, str]]) -> bool:
    """Whether a caption is full and true, read with other eyes than those that wrote it."""
    found = {(size, colour, shape) for size, colour, shape in re.findall(THING, caption)}
    if found != {(thing["size"], thing["colour"], thing["shape"]) for thing in scene}:
        return False
    named = {f"{thing['size']} {thing['colour']} {thing['shape']}": thing for thing in scene}
    claims = re.findall(rf"{THING} (?:at|in) the ({'|'.join(CELLS)})", caption)
    claims += [(*rest, place) for place, *rest in re.findall(rf"at the ({'|'.join(CELLS)}) {THING}", caption)]
    related = re.findall(rf"{THING} (above|below|left of|right of) {THING}", caption)
    if len(claims) + 2 * len(related) != len(scene):
        return False
    true = all(named[f"{size} {colour} {shape}"]["place"] == place for size, colour, shape, place in claims)
    for *first, how, size, colour, shape in related:
        true &= relation(named[" ".join(first)], named[f"{size} {colour} {shape}"]) == how
    return true


@needs_espeak
def test_captions_are_true_and_wrong_ones_are_not(world: Path) -> None:
    for name in ("train", "val", "test", "test_combinations"):
        for entry in annotations(world, name):
            scene = entry["scene"]["objects"]
            assert says(entry["caption"], scene), entry
            wrong = entry["negatives"] if name == "train" else list(entry["swaps"].values())
            assert len(wrong) >= 3
            for caption in wrong:
                assert not says(caption, scene), (caption, scene)
                changed = sum(a != b for a, b in zip(entry["caption"].split(), caption.split(), strict=True))
                assert 1 <= changed <= 2  # "top left" to "bottom right" is two words


def answer(question: str, scene: list[dict[str, str]]) -> str:
    """Answer a question about a scene, from the words alone."""
    article = {True: "an", False: "a"}

    def find(words_: str) -> list[dict[str, str]]:
        return [
            thing
            for thing in scene
            if all(word in (thing["colour"], thing["shape"], "one", "the", "a", "an") for word in words_.split())
        ]

    def only(words_: str) -> dict[str, str]:
        (thing,) = find(words_)
        return thing

    text = question.rstrip("?")
    its = r"(the (?:\w+ )?(?:one|" + "|".join(SHAPES) + "))"
    if text.startswith("how many"):
        return NUMBERS[len(scene)]
    if match := re.search(rf"{its} (above|below|left of|right of) {its}$", text):
        return "yes" if relation(only(match[1]), only(match[3])) == match[2] else "no"
    if match := re.search(rf"(above|below|left of|right of) {its}$", text):
        (thing,) = [other for other in scene if relation(other, only(match[2])) == match[1]]
        return f"a {thing['size']} {thing['colour']} {thing['shape']}"
    if match := re.search(rf"({'|'.join(CELLS)})", text):
        (thing,) = [other for other in scene if other["place"] == match[1]]
        return f"{article[thing['colour'] == 'orange']} {thing['colour']} {thing['shape']}"
    if match := re.fullmatch(r"(?:is there|do you see|can you find) (an? .*)", text):
        return "yes" if find(match[1]) else "no"
    match = re.search(its, text)
    assert match, question
    thing = only(match[1])
    if "color" in text:
        return thing["colour"]
    if "shape" in text:
        return thing["shape"]
    if "corner" in text or text.startswith("where"):
        return thing["place"]
    assert "big" in text or "size" in text, question
    return thing["size"]


def test_picture_answers_are_right(plan: Plan) -> None:
    scenes = {
        f"../images/{picture.image}": [
            {"colour": t.colour, "shape": t.shape, "size": t.size, "place": list(CELLS)[t.place]} for t in picture.scene
        ]
        for pictures in plan.pictures.values()
        for picture in pictures
    }
    asked = 0
    for line in (line for lines in plan.chats.values() for line in lines):
        if line["task"] not in ("image_qa", "image_speech_qa"):
            continue
        questions = [line["transcript"]] if "transcript" in line else []
        for message in line["messages"]:
            content = message["content"]
            if message["role"] == "assistant":
                assert answer(questions[-1], scenes[parts(line, "image")[0]]) == content, (questions, line)
                asked += 1
            elif isinstance(content, str):
                questions.append(content)
            else:
                questions += [part["text"] for part in content if part["type"] == "text"]
    assert asked > 2_000


def test_answers_are_balanced(plan: Plan) -> None:
    limits = {"count": 0.4, "size": 0.55, "exists": 0.55, "relation": 0.55, "place": 0.3}
    for split in ("train", "test"):
        counts: dict[tuple[str, str], Counter[str]] = {}
        for line in plan.chats[split]:
            if line["task"] not in ("image_qa", "image_speech_qa", "text_qa", "speech_qa"):
                continue
            answers = [message["content"] for message in line["messages"] if message["role"] == "assistant"]
            templates = line["template"] if isinstance(line["template"], list) else [line["template"]]
            for template, given in zip(templates, answers, strict=True):
                counts.setdefault((line["task"] + line["held_out"], template), Counter())[given] += 1
        for (task, template), counter in counts.items():
            number, most = counter.total(), max(counter.values())
            limit = limits.get(template.removeprefix("scene_"), 0.25)
            assert most <= limit * number + 1.5, (split, task, template, counter)


def test_arithmetic_is_right_and_tests_hold_out_their_operands(plan: Plan) -> None:
    texts = [text for documents in plan.texts.values() for text in documents]
    found = 0
    for text in texts:
        pattern = rf"\b({NUMBER}) (plus|minus) ({NUMBER})(?: is| makes| leaves|\?<\|end\|><\|assistant\|>) ?({NUMBER})"
        for a, sign, b, y in re.findall(pattern, text):
            first, second, result = (int(x) if x.isdigit() else COUNTED.index(x) for x in (a, b, y))
            assert not plan.world.operands_held_out(first, second)
            assert result == (first + second if sign == "plus" else first - second)
            found += 1
    assert found > 50
    for line in plan.chats["test"]:
        if line["template"] in ("add", "subtract"):
            asked = line.get("transcript") or line["messages"][0]["content"]
            a, b = (COUNTED.index(number) for number in re.findall(rf"\b({NUMBER})\b", words(asked)))
            assert plan.world.operands_held_out(a, b) and line["held_out"] == "operands"


def test_lessons_follow_one_another_and_ask_what_they_say(plan: Plan) -> None:
    first, second = TWO_LESSONS[0][1], TWO_LESSONS[1][1]
    assert [lesson_at(TWO_LESSONS, at) for at in (0.0, 0.49, 0.51, 0.999)] == [first, first, second, second]
    assert "numbers" not in first and second["numbers"] > sum(second.values()) / 2
    rng = random.Random(0)
    for kind, asked, never in (
        ("places", "where is", "color"),
        ("numbers", "plus", "ball"),
        ("people", "who", "plus"),
        ("things", "is there", "where is"),
        ("relations", "is the", "what color"),
    ):
        found = [primer_document(plan.world, rng, {kind: 1}) for _ in range(60)]
        assert asked in " ".join(found) and never not in " ".join(text.partition("<|user|>")[2] for text in found)
        assert not any("how many" in text for text in found)
    written = {kind for lessons in (TWO_LESSONS, FIVE_LESSONS) for _, kinds in lessons for kind in kinds}
    assert all(primer_document(plan.world, rng, {kind: 1}) for kind in written)


def test_scenes_hold_distinct_things_in_distinct_cells(plan: Plan) -> None:
    for pictures in plan.pictures.values():
        for picture in pictures:
            for first, second in combinations(picture.scene, 2):
                assert first.place != second.place and first.name != second.name
    tests = plan.pictures["test"]
    assert not any(picture.caption.fits(other.scene) for picture, other in combinations(tests, 2))


def test_no_recording_is_made_twice(plan: Plan, world: Path) -> None:
    """A question that training asks of another picture, in the same voice, must sound otherwise in a test."""
    jobs = [(job.text, job.voice, job.rate_scale, job.seed) for job in plan.recorder.jobs]
    again = len(jobs) - len({(text, voice) for text, voice, *_ in jobs})
    assert again > 20 and len(set(jobs)) == len(jobs)
    contents = [path.read_bytes() for path in (world / "audio" / "wavs").iterdir()]
    assert len(set(contents)) == len(contents)


def test_splits_depend_on_the_seed_alone(plan: Plan, tmp_path: Path) -> None:
    assert World(0).pairs == World(0, 150).pairs and World(0).heldout_words == plan.world.heldout_words
    assert World(1).pairs != World(0).pairs
    small = make_plan(SIZES["test"], 1, tmp_path)
    assert small.recorder.jobs != make_plan(SIZES["test"], 2, tmp_path).recorder.jobs


# --------------------------------------------------------------------------------------------------------------- voices


def test_voices() -> None:
    assert len(set(espeak.TRAIN_VOICES)) == 48 and len(set(espeak.UNSEEN_VOICES)) == 8
    assert not set(espeak.TRAIN_VOICES) & set(espeak.UNSEEN_VOICES)
    settings = [espeak.voice_settings(name) for name in (*espeak.TRAIN_VOICES, *espeak.UNSEEN_VOICES)]
    assert all(100 <= voice.rate <= 150 for voice in settings)  # about as people speak
    with pytest.raises(ValueError, match="accent-variant-pitch"):
        espeak.voice_settings("en-gb")


def test_size_and_package_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nano"):
        synthesize("huge", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="uv sync --extra synth"):
        synthesize("test", tmp_path)
    assert not (tmp_path / "test").exists()


@needs_espeak
def test_a_recording_depends_on_nothing_before_it(tmp_path: Path) -> None:
    """The same words sound the same whether spoken first, last, or by another worker."""
    jobs = []
    for group, texts in (("a", ("hello there.", "c a t.")), ("b", ("c a t.", "hello there."))):
        recorder = Recorder(tmp_path, 0)
        for text in texts:
            recorder.record(group, text, "us-f2-mid")
        jobs += recorder.jobs
    (tmp_path / "wavs").mkdir()
    for processes in (1, 2):
        with espeak.speak_all(jobs, processes) as speaking:
            assert len(speaking.wait()) == 4
        sounds = {path.name: path.read_bytes() for path in (tmp_path / "wavs").iterdir()}
        assert sounds["a_00000.wav"] == sounds["b_00001.wav"] != sounds["b_00000.wav"]


@needs_espeak
def test_a_voice_that_espeak_lacks_is_an_error(tmp_path: Path) -> None:
    job = espeak.Job("hello.", "us-nobody-mid", str(tmp_path / "x.wav"))
    with espeak.speak_all([job], 1) as speaking, pytest.raises(RuntimeError, match="nobody"):
        speaking.wait()
    assert not list(tmp_path.iterdir())


@needs_espeak
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_one_who_asked(tmp_path: Path, how: signal.Signals) -> None:
    code = (
        "from omni.data.espeak import Job, speak_all\n"
        f"jobs = [Job('a word or two.', 'us-f2-mid', r'{tmp_path}/%d.wav' % i) for i in range(5000)]\n"
        "with speak_all(jobs, 2) as speaking:\n    print(flush=True); speaking.wait()\n"
    )
    root = Path(__file__).parents[1]
    asking = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # a shell lets its background jobs ignore SIGINT, and every process below them would
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("*.wav")) and time.monotonic() < deadline:
        time.sleep(0.05)
    asking.send_signal(how)
    asking.wait()

    def alive() -> bool:
        try:
            os.killpg(asking.pid, 0)
        except ProcessLookupError:
            return False
        return True

    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()
    assert 0 < len(list(tmp_path.glob("*.wav"))) < 5000
