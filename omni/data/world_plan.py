"""What will be written of the micro-world: everything is drawn here, before a sound is made or a picture is painted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omni.data.chats import Chats, Picture, unit
from omni.data.espeak import JUDGE_VOICES, TRAIN_VOICES, UNSEEN_VOICES
from omni.data.primer import FIVE_LESSONS, MIXTURE, TWO_LESSONS, Lessons, lesson_at, primer_document
from omni.data.recordings import Recorder, Recording, turns_of
from omni.data.stories import (
    document,
    free_sentence,
    grammar_sentence,
    unheard_sentence,
    units,
)
from omni.data.world import World, normalize


@dataclass(frozen=True)
class Size:
    """How much of everything; validation parts follow from the test parts."""

    text_bytes: int
    primer_bytes: int  # of the text that stage A begins with
    images: int
    images_test: int  # of seen combinations, and as many of held-out ones
    tts_train: int  # recordings in the Talker's voices, some of them in asr_train too
    tts_voices: int
    tts_free: int  # one in so many of them lies outside the grammar
    asr_free: int  # outside the grammar
    asr_grammar: int
    asr_test: int
    tts_test: int
    image_chats: int  # of up to six questions
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
    judge: int = 0  # recordings of a recognizer that only grades speech output
    free_words: int = 0  # words of free speech; 0: the whole lexicon
    voices: int = 48
    lessons: Lessons = MIXTURE  # of the primer


_TEST = Size(
    text_bytes=30_000, primer_bytes=15_000,
    images=60, images_test=24, tts_train=16, tts_voices=2, tts_free=4, asr_free=12, asr_grammar=4,
    asr_test=8, tts_test=8, image_chats=20, captions=4, speech_qa=12, image_speech_qa=6, picture_recordings=4, asr=6,
    text_qa=30, text_chat=6, speech_out=4, chats_test=20, spoken_test=10, heldout_words=20, voices=6, judge=16,
)  # fmt: skip
_NANO = Size(
    text_bytes=2_500_000, primer_bytes=3_600_000, lessons=TWO_LESSONS,
    images=5_000, images_test=300, tts_train=2_600, tts_voices=4, tts_free=4, asr_free=1_100,
    asr_grammar=2_600, asr_test=150, tts_test=100, image_chats=2_500, captions=300, speech_qa=1_500,
    image_speech_qa=400, picture_recordings=200, asr=2_000, text_qa=1_500, text_chat=300, speech_out=200,
    chats_test=120, spoken_test=100,
    free_words=100,
)  # fmt: skip
_MICRO = Size(
    text_bytes=6_000_000, primer_bytes=6_900_000, lessons=FIVE_LESSONS,
    images=16_000, images_test=300, tts_train=5_000, tts_voices=16, tts_free=2, asr_free=4_000,
    asr_grammar=1_500, asr_test=300, tts_test=200, image_chats=5_000, captions=1_000, speech_qa=2_400,
    image_speech_qa=1_200, picture_recordings=300, asr=1_400, text_qa=9_000, text_chat=1_400, speech_out=500,
    chats_test=240, spoken_test=200, heldout_words=150, judge=4_000,
)  # fmt: skip
_TINY = Size(
    text_bytes=30_000_000, primer_bytes=6_000_000,
    images=60_000, images_test=500, tts_train=10_000, tts_voices=16, tts_free=2, asr_free=7_000,
    asr_grammar=4_000, asr_test=600, tts_test=300, image_chats=15_000, captions=3_000, speech_qa=7_000,
    image_speech_qa=3_500, picture_recordings=1_000, asr=4_000, text_qa=25_000, text_chat=4_000, speech_out=1_500,
    chats_test=500, spoken_test=400, heldout_words=150, judge=8_000,
)  # fmt: skip
_BASE = Size(
    text_bytes=100_000_000, primer_bytes=10_000_000,
    images=150_000, images_test=500, tts_train=20_000, tts_voices=24, tts_free=2,
    asr_free=20_000, asr_grammar=8_000, asr_test=600, tts_test=300, image_chats=40_000, captions=8_000,
    speech_qa=16_000, image_speech_qa=8_000, picture_recordings=2_000, asr=10_000, text_qa=60_000, text_chat=10_000,
    speech_out=4_000, chats_test=500, spoken_test=400, heldout_words=150, judge=8_000,
)  # fmt: skip
SIZES = {"test": _TEST, "nano": _NANO, "micro": _MICRO, "tiny": _TINY, "base": _BASE}


@dataclass
class Plan:
    """Everything that will be written."""

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


def make_plan(size: Size, seed: int, folder: Path) -> Plan:
    """Draw all that is to be written: the tests first, so that training can keep clear of what they say."""
    plan = Plan(World(seed, size.heldout_words, size.free_words), size, Recorder(folder / "audio", seed))
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
    plan.texts["primer"] = _documents(plan, "primer", size.primer_bytes)
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
        free = [new(lambda: free_sentence(world, rng, shortest=2)) for _ in range(count // 4)]
        texts = free + [grammar(split, (3, 18)) for _ in range(count - len(free))]
        rng.shuffle(texts)
        return texts

    rows("asr_val", plan.voices, heard(min(max(size.asr_test * 3 // 7, 4), 200), "val"), vary=True)
    rows("asr_test", plan.voices, heard(size.asr_test, "test"), vary=True)
    rows("asr_test_voices", UNSEEN_VOICES, heard(size.asr_test * 2 // 3, "test"), vary=True)
    lengths = ((3, 5), (6, 15), (16, 30))
    rows("tts_val", plan.tts_voices, [grammar("val", lengths[i % 3]) for i in range(size.tts_test // 3)], vary=False)
    rows("tts_test", plan.tts_voices, [grammar("test", lengths[i % 3]) for i in range(size.tts_test)], vary=False)
    shuffle = plan.rng("shuffled").sample  # the speech must follow the text, and not what sentences usually say
    spoken_words = [normalize(recording.text).split() for recording in plan.speech["tts_test"][:40]]
    mixed = [" ".join(shuffle(words, len(words))) + "." for words in spoken_words]
    rows("tts_test_shuffled", plan.tts_voices, mixed, vary=False)
    words = turns_of(sorted(world.heldout_words), rng)
    unheard = [unheard_sentence(world, rng, words, i % 3) for i in range(size.tts_test // 4)]  # a fifth of all
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
    if line["task"] in ("text_qa", "text_chat") or (line["task"] == "speech_out" and "transcript" not in line):
        return [str(line["messages"][0]["content"])]
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
        free = i % size.tts_free == 0
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
    # the Talker's few clear voices are the easiest: beyond a fifth of all they only take the place of the others
    clear = rng.sample(tts, min(len(tts), (len(heard) + len(questions)) // 4))
    plan.speech["asr_train"] = rng.sample(every := clear + heard + questions, len(every))
    if size.judge:
        _plan_judge(plan, new, {row.text for row in every + tts})


def _plan_judge(plan: Plan, new: Callable[[Callable[[], str]], str], said: set[str]) -> None:
    """Choose what the judge of speech output hears: sentences and voices that no stage heard."""
    rng = plan.rng("speech/judge")
    speaker = turns_of(JUDGE_VOICES, plan.rng("voices/judge"))
    texts: list[str] = []
    while len(texts) < plan.size.judge:
        text = new(partial(_any_sentence, plan.world, rng))
        if text not in said:
            said.add(text)
            texts.append(text)
    share = max(4, min(200, len(texts) // 20))
    for name, part in (("judge_val", texts[:share]), ("judge_train", texts[share:])):
        plan.speech[name] = [plan.recorder.record("judge", text, next(speaker)) for text in part]


def _any_sentence(world: World, rng: random.Random) -> str:
    """Draw a sentence of the grammar or outside it, as often."""
    return free_sentence(world, rng) if rng.random() < 0.5 else grammar_sentence(world, rng, "train", 3, 18)


def _documents(plan: Plan, split: str, num_bytes: int) -> list[str]:
    """Draw documents of stage A; those of training are none of the others, and say nothing that a test says.

    `split` is that of a scene, or `primer`: other documents, for the beginning of the training.
    """
    rng = plan.rng(f"text/{split}")
    others = {text for documents in plan.texts.values() for text in documents}
    documents: list[str] = []
    total = 0
    while total < num_bytes:
        if split == "primer":
            text = primer_document(plan.world, rng, lesson_at(plan.size.lessons, total / num_bytes))
        else:
            text = document(plan.world, rng, split)
        if text in others or (split in ("train", "primer") and units(text) & plan.avoid):
            continue
        documents.append(text)
        total += len(text) + 2
    return documents
