"""Stage E's chats of the micro-world: one object a line, in the format of the dialogue manifests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omni.data.lexicon import PICTURE_QUESTIONS, REQUESTS
from omni.data.questions import CLOSED, IN_CONTEXT, Balance, Question, picture_questions, word_question, written_scene
from omni.data.recordings import Recorder, Recording
from omni.data.stories import TELLING, Turns, several_questions, story_chat, talk, units
from omni.data.world import Caption, Scene, World, normalize

Line = dict[str, Any]

# Shares of the question kinds. Over half of what is asked by voice needs the very words: sums, people, scenes.
SPOKEN_KINDS = dict.fromkeys(CLOSED, 2) | {
    "add": 8,
    "subtract": 6,
    "person_color": 18,
    "person_object": 18,
    "who_has": 18,
    "scene_color": 5,
    "scene_shape": 5,
    "scene_size": 3,
    "scene_place": 3,
    "scene_relation": 5,
}
WRITTEN_KINDS = dict.fromkeys(CLOSED, 4) | dict.fromkeys((f"scene_{name}" for name in PICTURE_QUESTIONS), 4) | {
    "scene_neighbor": 2,
    "add": 14,
    "subtract": 10,
    "person_color": 6,
    "person_object": 6,
    "who_has": 6,
}  # fmt: skip
# A thing above another is asked for by its whole name, which is long: fewer of these
PICTURE_WEIGHTS = {"neighbor": 0.4}


@dataclass(frozen=True)
class Picture:
    """A drawn scene and its caption."""

    image: str
    scene: Scene
    caption: Caption


@dataclass
class Chats:
    """Makes the chats of one split; `avoid` holds what may not be said in it (see `units`)."""

    world: World
    recorder: Recorder
    split: str
    voices: Iterator[str]
    avoid: set[str]
    lines: list[Line] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)  # the questions of this split, normalized
    spoken: list[tuple[Question, Recording]] = field(default_factory=list)
    picture_recordings: list[Recording] = field(default_factory=list)
    scenes: dict[str, dict[str, list[Question]]] = field(default_factory=dict)  # all that is asked of written scenes

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.world.seed}/chats/{self.split}")

    def add(
        self, task: str, template: str | list[str], held_out: str, turns: Sequence[tuple[Any, str]], **more: Any
    ) -> None:
        """Append one chat; nothing is held out in training."""
        messages = []
        for said, answer in turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        held_out = "none" if self.split == "train" else held_out
        self.lines.append({"task": task, "template": template, "held_out": held_out, **more, "messages": messages})

    # ------------------------------------------------------------------------------------------------------- in words

    def draw(self, balance: Balance, kind: str, spoken: bool) -> Question:
        """Draw a question that is new in a test, and in training none of the tests'."""
        options: list[Question] = []
        for _ in range(500):
            question = self._question(kind, spoken)
            if self._is_new(question):
                options.append(question)
                if len(options) == 6:
                    break
        if not options:  # all questions of a closed kind are used: there are seven days, but no end of people
            return self.draw(balance, self.rng.choice(IN_CONTEXT), spoken)
        chosen = balance.pick(self.rng, options)
        self.texts.add(unit(chosen.full_text))
        return chosen

    def _is_new(self, question: Question) -> bool:
        """Say whether a test has not asked this yet, or whether training may ask and answer it."""
        if self.split == "train":
            return not (units(question.full_text) | units(question.sentence)) & self.avoid
        return unit(question.full_text) not in self.texts | self.avoid

    def _question(self, kind: str, spoken: bool) -> Question:
        if spoken or not kind.startswith("scene_"):
            return word_question(self.world, self.rng, kind, self.split, spoken)
        while True:
            context, asked = written_scene(self.world, self.rng, self.split)
            if options := asked.get(kind.removeprefix("scene_")):
                self.scenes[context] = asked
                return _in_words(self.rng.choice(options), context)

    def text_qa(self, count: int) -> None:
        """Ask in writing: once a chat in a test, several times in training."""
        balance, self.texts = Balance(), set()
        for kind in deal(self.rng, WRITTEN_KINDS, count):
            question = self.draw(balance, kind, spoken=False)
            asked = [question] if self.split != "train" else self._and_more(balance, question)
            turns = [(asked[0].full_text, asked[0].answer)]
            for before, after in itertools.pairwise(asked):
                new = after.full_text if after.context != before.context else after.text
                turns.append((new, after.answer))
            template = [each.template for each in asked] if len(asked) > 1 else question.template
            self.add("text_qa", template, question.held_out, turns)

    def _and_more(self, balance: Balance, question: Question) -> list[Question]:
        """Return a question and some that may follow it: about the same scene, or others of its kind."""
        if question.context in self.scenes:
            asked = [question]
            for each in several_questions(self.rng, self.scenes[question.context], 8):
                other = _in_words(each, question.context)
                if other.text != question.text and len(asked) < 5 and balance.admits(other):
                    asked.append(balance.pick(self.rng, [other]))
            return asked
        return [question, *(self.draw(balance, question.template, spoken=False) for _ in range(2))]

    def speech_qa(self, count: int) -> None:
        """Ask by voice; the recording is the whole turn."""
        balance, self.texts = Balance(), set()
        for kind in deal(self.rng, SPOKEN_KINDS, count):
            question = self.draw(balance, kind, spoken=True)
            recording = self.recorder.record(f"{self.split}_question", question.full_text, next(self.voices))
            self.spoken.append((question, recording))
            turn = [audio(recording)], question.answer
            self.add("speech_qa", question.template, question.held_out, [turn], transcript=recording.text)

    def speech_out(self, count: int, answer_in: Callable[[str], Recording] | None) -> None:
        """Ask, half of the time by voice, for an answer to be spoken; `answer_in` records the answers of training.

        It is as long as a written one. In a sentence, what was asked has to be said again before the answer; that was
        learned last and worst (docs/log.md).
        """
        balance, self.texts = Balance(), set()
        asked: list[tuple[Question, Recording | None]] = [*self.spoken[: count // 2]]
        for kind in deal(self.rng, SPOKEN_KINDS, count - len(asked)):
            asked.append((self.draw(balance, kind, spoken=False), None))
        for question, recording in asked:
            said: Any = question.full_text if recording is None else [audio(recording)]
            more: dict[str, Any] = {"speak": True} | ({"transcript": recording.text} if recording else {})
            if answer_in is not None:
                spoken_answer = answer_in(question.answer)
                more |= {"answer_audio": f"../audio/{spoken_answer.wav}", "speaker": spoken_answer.speaker}
            self.add("speech_out", question.template, question.held_out, [(said, question.answer)], **more)

    def text_chat(self, count: int) -> None:
        """Greet, talk and tell stories."""
        self.texts = set()
        for kind in deal(self.rng, {"greeting": 25, "small_talk": 25, "story": 50}, count):
            turns = self._talk(kind)
            self.texts |= {normalize(said) for said, _ in turns}
            self.add("text_chat", kind, "sentence", turns)

    def _talk(self, kind: str) -> Turns:
        for _ in range(500):
            turns = story_chat(self.world, self.rng) if kind == "story" else talk(self.world, self.rng, kind)
            if self.split == "train":
                if kind != "story" and self.rng.random() < 0.3:
                    turns += talk(self.world, self.rng, "small_talk")
                if not any(units(part) & self.avoid for turn in turns for part in turn):
                    return turns
            elif (
                normalize(turns[0][0]) not in self.texts | self.avoid and set(normalize(turns[0][0]).split()) & TELLING
            ):
                return turns
        return self._talk("story")  # there are only so many greetings

    def asr(self, recordings: Sequence[Recording]) -> None:
        """Ask for a transcript."""
        for recording in recordings:
            said = [audio(recording), {"type": "text", "text": REQUESTS["asr"]}]
            self.add("asr", "asr", "sentence", [(said, recording.text)], transcript=recording.text)

    # ----------------------------------------------------------------------------------------------------- of pictures

    def caption(self, pictures: Sequence[Picture]) -> None:
        """Ask for a description."""
        for picture in pictures:
            said = [image(picture), {"type": "text", "text": REQUESTS["caption"]}]
            self.add("caption", "caption", "scene", [(said, picture.caption.text)])

    def image_chats(self, pictures: Sequence[Picture]) -> None:
        """Ask several questions about each picture: dense questions teach more than pictures."""
        balance = Balance()
        for picture in pictures:
            asked = picture_questions(self.world, self.rng, picture.scene)
            order = sorted(asked, key=lambda name: -(self.rng.random() ** (1 / PICTURE_WEIGHTS.get(name, 1.0))))
            order.sort(key=lambda name: not any(balance.admits(option) for option in asked[name]))
            chosen = [balance.pick(self.rng, asked[name]) for name in order[:6]]
            self.rng.shuffle(chosen)
            turns: list[tuple[Any, str]] = [(question.text, question.answer) for question in chosen]
            turns[0] = ([image(picture), {"type": "text", "text": chosen[0].text}], chosen[0].answer)
            self.add("image_qa", [question.template for question in chosen], "none", turns)

    def image_qa(self, pictures: Sequence[Picture], count: int, combination: bool = False) -> None:
        """Ask one question a picture, the answers of each template balanced."""
        held_out = "combination" if combination else "scene"
        for picture, question in self._one_question_each(pictures, count, combination):
            said = [image(picture), {"type": "text", "text": question.text}]
            self.add("image_qa", question.template, held_out, [(said, question.answer)])

    def image_speech_qa(self, pictures: Sequence[Picture], count: int, distinct: int) -> None:
        """Ask by voice about a picture; some pictures share a recording, so that there are fewer of these."""
        known: dict[str, list[Recording]] = {}

        def sayable(question: Question) -> bool:
            return len(self.picture_recordings) < distinct or question.text in known

        for picture, question in self._one_question_each(pictures, count, False, sayable):
            own = known.setdefault(question.text, [])
            recording = self.rng.choice(own) if own else None
            if recording is None or (len(self.picture_recordings) < distinct and len(own) < 3):
                recording = self.recorder.record(f"{self.split}_picture", question.text, next(self.voices))
                own.append(recording)
                self.picture_recordings.append(recording)
            said = [image(picture), audio(recording)]
            turn = said, question.answer
            self.add("image_speech_qa", question.template, "scene", [turn], transcript=recording.text)

    def _one_question_each(
        self,
        pictures: Sequence[Picture],
        count: int,
        combination: bool,
        sayable: Callable[[Question], bool] = lambda question: True,
    ) -> Iterator[tuple[Picture, Question]]:
        """Choose picture and question together: of forty pictures, one whose answer the template needs."""
        balance, pool = Balance(), list(pictures)
        weights = {name: PICTURE_WEIGHTS.get(name, 1.0) for name in PICTURE_QUESTIONS}
        for template in deal(self.rng, weights, count):
            options = self._options(template, pool, combination, sayable)
            if not options:  # those left cannot be asked this: all may be asked again
                pool = list(pictures)
                options = self._options(template, pool, combination, sayable)
            if not options:
                continue
            question = balance.pick(self.rng, options)
            index = options[question]
            pool[index], pool[-1] = pool[-1], pool[index]
            yield pool.pop(), question

    def _options(
        self, template: str, pool: list[Picture], combination: bool, sayable: Callable[[Question], bool]
    ) -> dict[Question, int]:
        """Return a template's questions about forty pictures of a pool, or about more if these allow none."""
        options: dict[Question, int] = {}
        for number in (40, 400, len(pool)):
            for index in self.rng.sample(range(len(pool)), min(number, len(pool))):
                scene = pool[index].scene
                focus = self.world.held_out_things(scene) if combination else ()
                asked = picture_questions(
                    self.world, self.rng, scene, seen_only=not combination, focus=focus, templates=(template,)
                )
                options |= dict.fromkeys(filter(sayable, asked.get(template, ())), index)
            if options:
                break
        return options


def _in_words(question: Question, context: str) -> Question:
    """Turn a question about a picture into one about a written scene."""
    return replace(question, template=f"scene_{question.template}", context=context)


def unit(text: str) -> str:
    """Return a question or sentence as it is compared across manifests."""
    return normalize(text.removeprefix("scene: "))


def audio(recording: Recording) -> dict[str, str]:
    """Return a recording as a part of a turn."""
    return {"type": "audio", "audio": f"../audio/{recording.wav}"}


def image(picture: Picture) -> dict[str, str]:
    """Return a picture as a part of a turn."""
    return {"type": "image", "image": f"../images/{picture.image}"}


def deal(rng: random.Random, weights: Mapping[str, float], count: int) -> list[str]:
    """Return kinds in the shares of their weights, in random order."""
    kinds: list[str] = []
    total, due = sum(weights.values()), 0.0
    for kind, weight in weights.items():
        due += weight * count / total
        kinds += [kind] * (round(due) - len(kinds))
    rng.shuffle(kinds)
    return kinds
