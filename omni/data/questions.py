"""Questions with short answers: about pictures, about written and spoken scenes, about people, numbers and facts.

A `Question` carries its template (answers are balanced and compared within a template) and a whole sentence that
answers it, for texts in which it is said.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from omni.data.lexicon import (
    COLOURS,
    DAYS,
    INVERSE,
    NUMBERS,
    OBJECTS,
    OPPOSITES,
    OWNING,
    PERSON_QUESTIONS,
    PICTURE_QUESTIONS,
    PLACES,
    QUESTIONS,
    SHAPES,
    SIZES,
    SOUNDS,
    SPOKEN_COLOURS,
    SPOKEN_SCENES,
    STATEMENTS,
    number_words,
)
from omni.data.world import Scene, Thing, World, fix_articles, key, relation, with_article

# The answers of the templates that have few
ANSWERS: dict[str, tuple[str, ...]] = {
    "count": NUMBERS[1:4],
    "color": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "place": PLACES,
    "exists": ("yes", "no"),
    "relation": ("yes", "no"),
}


@dataclass(frozen=True)
class Question:
    """One question; `context` is what has to be known to answer it, said before it."""

    template: str
    text: str
    answer: str
    context: str = ""
    sentence: str = ""  # the answer as a sentence, where one is defined
    held_out: str = "sentence"

    @property
    def full_text(self) -> str:
        """Context and question."""
        return f"{self.context} {self.text}".strip()


@dataclass
class Balance:
    """Chooses questions so that within a template every answer is asked for equally often."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def pick(self, rng: random.Random, options: Iterable[Question]) -> Question:
        """Return the option whose answer was used least in its template, at random among equals."""
        ranked = [(self._used(option), rng.random(), i, option) for i, option in enumerate(options)]
        chosen = min(ranked, key=lambda entry: entry[:3])[3]
        self.counts.setdefault(chosen.template, Counter())[chosen.answer] += 1
        return chosen

    def admits(self, option: Question) -> bool:
        """Say whether an answer is not yet ahead of the template's rarest one; always true of open answers."""
        possible = ANSWERS.get(option.template.removeprefix("scene_"))
        counts = self.counts.get(option.template, Counter())
        return possible is None or counts[option.answer] <= min(counts[answer] for answer in possible) + 3

    def _used(self, option: Question) -> int:
        return self.counts.get(option.template, Counter())[option.answer]


# ------------------------------------------------------------------------------------------------------------ pictures


def picture_questions(
    world: World,
    rng: random.Random,
    scene: Scene,
    *,
    seen_only: bool = True,
    focus: Iterable[Thing] = (),
    templates: Iterable[str] = PICTURE_QUESTIONS,
) -> dict[str, list[Question]]:
    """Return all that can be asked about a scene, by template.

    `seen_only`: no question names a held-out combination, not even to be denied. `focus`: ask about these things where
    the template asks about one.
    """
    wanted, among = set(templates), set(focus)
    chosen = [thing for thing in scene if thing in among] or list(scene)
    found: dict[str, list[Question]] = {}

    def add(template: str, answer: str, **words: str) -> None:
        if template in wanted:
            text = rng.choice(PICTURE_QUESTIONS[template]).format(**words)
            found.setdefault(template, []).append(Question(template, text, answer, held_out="scene"))

    add("count", NUMBERS[len(scene)])
    for thing in chosen:
        shape_only, colour_only = _unique(thing, scene, "shape"), _unique(thing, scene, "colour")
        it = f"the {thing.shape}" if shape_only and rng.random() < 0.7 else f"the {thing.name}"
        if shape_only:
            add("color", thing.colour, it=f"the {thing.shape}")
        if colour_only:
            add("shape", thing.shape, it=f"the {thing.colour} one")
        add("size", thing.size, it=it)
        add("place", PLACES[thing.place], it=it)
        add("at_place", with_article(thing.name), place=PLACES[thing.place])
        add("exists", "yes", thing=with_article(thing.name))
    for colour, shape in _absent(scene, chosen):
        if not (seen_only and (colour, shape) in world.pairs):
            add("exists", "no", thing=with_article(f"{colour} {shape}"))
    _ask_relations(world, rng, scene, chosen, seen_only, add)
    return found


def _ask_relations(
    world: World, rng: random.Random, scene: Scene, chosen: list[Thing], seen_only: bool, add: Callable[..., None]
) -> None:
    """Ask how neighbours stand to each other; diagonal ones are never asked about."""
    for thing in chosen:
        for other in scene:
            how = relation(thing, other)
            if how is None:
                continue
            named = [
                f"the {t.shape}" if _unique(t, scene, "shape") and rng.random() < 0.7 else f"the {t.name}"
                for t in (thing, other)
            ]
            add("relation", "yes", it=named[0], relation=how, other=named[1])
            if not (seen_only and world.relation_held_out(thing, INVERSE[how], other)):
                add("relation", "no", it=named[0], relation=INVERSE[how], other=named[1])
            add("neighbor", with_article(thing.full_name), relation=how, other=named[1])


def _unique(thing: Thing, scene: Scene, attribute: str) -> bool:
    """Say whether no other thing shares an attribute."""
    return all(getattr(other, attribute) != getattr(thing, attribute) for other in scene if other != thing)


def _absent(scene: Scene, chosen: list[Thing]) -> list[tuple[str, str]]:
    """Return colour and shape pairs that are not there though the colour or the shape is: hard to deny."""
    there = {(thing.colour, thing.shape) for thing in scene}
    crossed = {(a.colour, b.shape) for a in scene for b in scene}
    near = {(thing.colour, shape) for thing in chosen for shape in SHAPES}
    near |= {(colour, thing.shape) for thing in chosen for colour in COLOURS}
    return sorted((crossed or near) - there) or sorted(near - there)


# --------------------------------------------------------------------------------------------------------------- words

IN_CONTEXT = ("person_color", "person_object", "who_has")
ARITHMETIC = ("add", "subtract")
CLOSED = ("successor", "predecessor", "day_after", "day_before", "opposite", "sound")


def closed_facts(kind: str) -> list[tuple[str, str]]:
    """Return (what is asked, answer) of a kind of which everything is known in training."""
    if kind == "successor":
        return list(pairwise(NUMBERS))
    if kind == "predecessor":
        return [(after, before) for before, after in pairwise(NUMBERS)]
    if kind == "day_after":
        return [(day, DAYS[(i + 1) % 7]) for i, day in enumerate(DAYS)]
    if kind == "day_before":
        return [(day, DAYS[i - 1]) for i, day in enumerate(DAYS)]
    if kind == "opposite":
        return [(a, b) for a, b in OPPOSITES] + [(b, a) for a, b in OPPOSITES]
    assert kind == "sound", kind
    return sorted(SOUNDS.items())


def closed_question(world: World, rng: random.Random, kind: str, split: str) -> Question:
    """Ask for a fact. Each fact has one wording that is kept for the test; training knows the others."""
    x, y = rng.choice(closed_facts(kind))
    wordings = QUESTIONS[kind]
    kept = int(key(world.seed, "wording", kind, x) * len(wordings))
    wording = kept if split == "test" else (kept + rng.randrange(1, len(wordings))) % len(wordings)
    text, sentence = wordings[wording].format(x=x), STATEMENTS[kind][0].format(x=x, y=y)
    return Question(kind, fix_articles(text), y, sentence=fix_articles(sentence))


def operands(world: World, rng: random.Random, kind: str, split: str) -> tuple[int, int]:
    """Draw two numbers to add or subtract, no result below zero or above ninety-nine.

    Half of what is trained is the table of the numbers up to ten, all of it. The others are a number of two digits and
    one of one digit, some of which are held out: who knows the table can put them together. A table with gaps only
    teaches that what is missing in it is wrong (docs/log.md).
    """
    if split != "test" and rng.random() < 0.5:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return (a, b) if kind == "add" else (a + b, a)
    while True:
        a, b = rng.randint(20, 99), rng.randint(1, 9)
        if world.operands_held_out(a, b) == (split == "test") and (kind == "subtract" or a + b < 100):
            return a, b


def arithmetic(world: World, rng: random.Random, kind: str, split: str) -> Question:
    """Ask for a sum or a difference."""
    a, b = operands(world, rng, kind, split)
    y = number_words(a + b if kind == "add" else a - b)
    text = rng.choice(QUESTIONS[kind]).format(a=number_words(a), b=number_words(b))
    return Question(
        kind, text, y, sentence=f"the answer is {y}.", held_out="operands" if split == "test" else "sentence"
    )


def arithmetic_statement(world: World, rng: random.Random, kind: str, split: str) -> str:
    """State a sum or a difference; `if you add one and two, you get three.`"""
    a, b = operands(world, rng, kind, split)
    y = a + b if kind == "add" else a - b
    return rng.choice(STATEMENTS[kind]).format(a=number_words(a), b=number_words(b), y=number_words(y))


def person_questions(
    world: World, rng: random.Random, kinds: Iterable[str], spoken: bool = False
) -> dict[str, list[Question]]:
    """Ask of each of up to three people who has what; they are met only in this very context, one for all kinds.

    Of one person all is said in a sentence, and to look there is learned first; of several the right one must be found.
    The spoken form takes less than five seconds; it has a context of its own for each kind.
    """
    number = rng.choice((1, 2) if spoken else (1, 1, 2, 3))
    people, objects = rng.sample(world.names, number), rng.sample(OBJECTS, number)
    colours = rng.sample(COLOURS, number)
    owned = [with_article(f"{c} {o}") for o, c in zip(objects, colours, strict=True)]
    verbs = OWNING[:1] if spoken else OWNING
    context = " ".join(rng.choice(verbs).format(a=a, thing=thing) for a, thing in zip(people, owned, strict=True))
    found: dict[str, list[Question]] = {}
    for kind in kinds:
        said = context
        if spoken and kind == "person_color":
            wording = rng.choice(SPOKEN_COLOURS)
            told = [wording.format(a=a, o=o, c=c) for a, o, c in zip(people, objects, colours, strict=True)]
            said = " ".join(map(fix_articles, told))
        elif spoken and kind == "who_has":
            said = " ".join(verbs[0].format(a=a, thing=with_article(o)) for a, o in zip(people, objects, strict=True))
        wordings = PERSON_QUESTIONS[kind][: 2 if spoken else None]
        for person, owned_object, colour, thing in zip(people, objects, colours, owned, strict=True):
            answer, sentence = {
                "person_color": (colour, f"the {owned_object} is {colour}."),
                "person_object": (thing, f"{person} has {thing}."),
                "who_has": (person, f"{person} has the {owned_object}."),
            }[kind]
            text = rng.choice(wordings).format(a=person, object=owned_object)
            found.setdefault(kind, []).append(Question(kind, text, answer, said, sentence))
    return found


def person_question(world: World, rng: random.Random, kind: str, spoken: bool = False) -> Question:
    """Ask about one person."""
    return rng.choice(person_questions(world, rng, (kind,), spoken)[kind])


def written_scene(world: World, rng: random.Random, split: str) -> tuple[str, dict[str, list[Question]]]:
    """Return a scene in words (`scene: ...`) and all that can be asked about it."""
    scene, caption = world.draw_described(rng, split)
    related = any(clause.other is not None for clause in caption.clauses)
    hidden = {"place", "at_place"} if related else set()  # what the words do not give
    if related and len(scene) == 3:  # one pair is told; how the third stands to it is not
        hidden |= {"relation", "neighbor"}
    asked = picture_questions(world, rng, scene, templates=set(PICTURE_QUESTIONS) - hidden)
    return f"scene: {caption.text}.", asked


def spoken_scene(world: World, rng: random.Random, template: str, split: str) -> Question:
    """Return a scene of one or two things in a short form, and a question about it."""
    while True:
        scene = world.draw_scene(rng, split, count=2)
        first, second = rng.sample(scene, 2)
        how = relation(first, second)
        if how is not None and first.shape != second.shape and first.colour != second.colour:
            break
    if template in ("scene_size", "scene_place"):
        context = f"there is {with_article(first.full_name)} at the {PLACES[first.place]}."
    else:
        context = f"{with_article(first.name)} is {how} {with_article(second.name)}."
    target, answer = first, ""
    if template in ("scene_color", "scene_shape"):
        target = rng.choice((first, second))
        answer = target.colour if template == "scene_color" else target.shape
    elif template in ("scene_size", "scene_place"):
        answer = first.size if template == "scene_size" else PLACES[first.place]
    asked, other = how, second
    if template == "scene_relation":
        answer = rng.choice(("yes", "no"))
        asked = how if answer == "yes" else INVERSE[how]
        if rng.random() < 0.5:  # ask from the other thing's side
            target, other, asked = second, first, INVERSE[asked]
    words = {"colour": target.colour, "shape": target.shape, "relation": asked, "other": other.shape}
    return Question(template, SPOKEN_SCENES[template].format(**words), answer, context, held_out="scene")


def word_question(world: World, rng: random.Random, kind: str, split: str, spoken: bool = False) -> Question:
    """Return a question of any kind in words (`add`, `who_has`, `opposite`, `scene_color`, ...)."""
    if kind in ARITHMETIC:
        return arithmetic(world, rng, kind, split)
    if kind in IN_CONTEXT:
        return person_question(world, rng, kind, spoken)
    if kind in CLOSED:
        return closed_question(world, rng, kind, split)
    return spoken_scene(world, rng, kind, split)
