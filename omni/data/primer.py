"""The text that stage A begins with: nothing but to look things up, and to reckon where that is not learned by itself.

In one mixture, or in lessons of which each asks for little else than what it is about.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from omni.data.lexicon import NUMBERS, PICTURE_QUESTIONS
from omni.data.questions import IN_CONTEXT, Question, person_questions, written_scene
from omni.data.stories import chat_document, echo, several_questions, short_questions, stated_sums, turns_about
from omni.data.world import World

# (how much of the text, how often each kind of document in it), one lesson after another
Lessons = tuple[tuple[float, Mapping[str, float]], ...]

# All at a time. Of several things only the places are asked in some documents: of two words each, they are learned
# last, and not at all where they are asked about little.
_LOOKING_UP = {"people": 2, "scene": 1, "places": 1, "echo": 1}
MIXTURE: Lessons = ((1.0, _LOOKING_UP),)
# What is learned alone is learned soon, and keeps if some of what follows asks for it. A Thinker of size nano never
# learns sums while it learns all else (0.1 to 0.25 of those held out right), but in 300 steps of nothing else (0.9).
# Looking up comes first: after numbers it is not learned any more (docs/log.md).
TWO_LESSONS: Lessons = (
    (0.5, _LOOKING_UP),
    (0.5, {"numbers": 4, "people": 1, "scene": 0.5, "places": 0.5, "echo": 0.5}),
)
# With more steps there is time for each alone. Whether a thing exists is learned right after what it looks like, and
# only where hardly anything else is asked at that time.
FIVE_LESSONS: Lessons = (
    (0.08, {"echo": 1}),
    (0.17, {"people": 3, "echo": 1}),
    (0.22, {"places": 4, "people": 1, "echo": 1}),
    (0.18, {"things": 5, "echo": 1}),
    (0.35, {"relations": 2, "people": 3, "places": 2, "things": 2, "echo": 1.5}),
)
# What is asked about a written scene, by the kind of document; the count is easy.
_ASKED = {
    "scene": set(PICTURE_QUESTIONS) - {"count"},
    "places": {"place", "at_place"},
    "things": {"color", "shape", "size", "exists"},
    "relations": {"relation", "neighbor"},
}


def lesson_at(lessons: Lessons, progress: float) -> Mapping[str, float]:
    """Return the kinds of documents after a share of the text, from 0 to below 1."""
    whole, until = sum(share for share, _ in lessons), 0.0
    for share, kinds in lessons:
        until += share / whole
        if progress < until:
            return kinds
    return lessons[-1][1]


def primer_document(world: World, rng: random.Random, kinds: Mapping[str, float]) -> str:
    """Draw a document of one of these kinds: several things or people, and much to look up about them; or numbers.

    Where there is one thing alone it is enough to know what was said; and where all else is to be learned at the same
    time, a small Thinker loses the heads that look things up before it needs them. Some documents are to be repeated:
    where every answer is a word or two, the heads that find what followed a word learn to stop there, and later neither
    text nor recordings can be said again (docs/log.md).
    """
    kind = rng.choices(tuple(kinds), tuple(kinds.values()))[0]
    if kind == "echo":
        return chat_document(echo(world, rng, "train"))
    if kind == "numbers" and rng.random() < 0.3:
        return stated_sums(world, rng)
    if kind == "numbers":
        return chat_document(list(short_questions(world, rng, "numbers")))
    if kind == "people":
        questions: list[Question] = []
        while len(questions) <= len(IN_CONTEXT):  # one person
            questions = [each for some in person_questions(world, rng, IN_CONTEXT).values() for each in some]
        return chat_document(turns_about(rng, questions))
    asked: dict[str, list[Question]] = {}
    count = ""
    while not asked or count == NUMBERS[1]:
        context, everything = written_scene(world, rng, "train")
        count = everything["count"][0].answer
        asked = {template: some for template, some in everything.items() if template in _ASKED[kind]}
    return chat_document(turns_about(rng, several_questions(rng, asked, 8), context))
