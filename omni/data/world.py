"""The micro-world: scenes of coloured shapes, the sentences that describe them, and what is held out.

One split serves every manifest. Whether something is held out is a pure function of the seed, so that text, speech and
pictures agree without ever looking at each other, and a figure on a held-out part means generalization.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from omni.data.lexicon import COLOURS, HE, INVERSE, PLACES, RELATIONS, SHAPES, SHE, SIZES, grammar_words, lexicon

CHANGES = ("colour", "shape", "size", "place", "relation")  # what a false caption may have wrong


def key(seed: int, *parts: object) -> float:
    """Return a number in [0, 1) that depends on the seed and the parts alone."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def normalize(text: str) -> str:
    """Return the words of a sentence alone, for comparing sentences across manifests."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def with_article(words: str) -> str:
    """Put `a` or `an` before some words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def fix_articles(sentence: str) -> str:
    """Write `an` where the word after an `a` needs it; a spelled `a` before a letter stays."""
    return re.sub(r"\ba (?=[aeio]\w)", "an ", sentence)


@dataclass(frozen=True, order=True)
class Thing:
    """A coloured shape in one cell of the picture; `place` is an index into PLACES."""

    place: int
    colour: str
    shape: str
    size: str

    @property
    def name(self) -> str:
        """Colour and shape: what identifies a thing within its scene."""
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        """Size, colour and shape."""
        return f"{self.size} {self.colour} {self.shape}"


Scene = tuple[Thing, ...]  # in the order of the places


def relation(first: Thing, second: Thing) -> str | None:
    """Return how the first thing stands to the second, or None where the two are diagonal (or in one cell)."""
    row, column = first.place // 2 - second.place // 2, first.place % 2 - second.place % 2
    if row and not column:
        return "below" if row > 0 else "above"
    if column and not row:
        return "right of" if column > 0 else "left of"
    return None


@dataclass(frozen=True)
class Clause:
    """One statement of a caption: a thing at its place, or a thing and how it stands to another one."""

    thing: Thing
    relation: str | None = None
    other: Thing | None = None

    def things(self) -> Iterator[Thing]:
        """Yield the thing or the two things."""
        yield self.thing
        if self.other is not None:
            yield self.other


@dataclass(frozen=True)
class Caption:
    """A description of a scene: what it says (clauses) and how (form)."""

    clauses: tuple[Clause, ...]
    form: int

    @property
    def text(self) -> str:
        """The sentence, without a full stop."""
        parts = [self._clause(clause) for clause in self.clauses]
        if self.form == 3:
            return ", ".join(parts)
        start = "there is " if self.form == 2 else ""
        return start + (", ".join(parts[:-1]) + " and " if len(parts) > 1 else "") + parts[-1]

    def _clause(self, clause: Clause) -> str:
        name, place = with_article(clause.thing.full_name), PLACES[clause.thing.place]
        if clause.other is not None:
            return f"{name} {clause.relation} {with_article(clause.other.full_name)}"
        if self.form == 1:
            return f"{name} in the {place} corner"
        return f"at the {place} {name}" if self.form == 3 else f"{name} at the {place}"

    @property
    def meaning(self) -> frozenset[tuple[str, ...]]:
        """What the sentence says, whatever its form and order; a relation and its inverse mean the same."""
        facts: set[tuple[str, ...]] = set()
        for clause in self.clauses:
            if clause.other is None or clause.relation is None:
                facts.add((clause.thing.full_name, PLACES[clause.thing.place]))
            elif clause.relation in ("above", "left of"):
                facts.add((clause.thing.full_name, clause.relation, clause.other.full_name))
            else:
                facts.add((clause.other.full_name, INVERSE[clause.relation], clause.thing.full_name))
        return frozenset(facts)

    def fits(self, scene: Scene) -> bool:
        """Say whether the sentence is a full and true description of a scene."""
        if sum(1 for clause in self.clauses for _ in clause.things()) != len(scene):
            return False
        facts: set[tuple[str, ...]] = {(thing.full_name, PLACES[thing.place]) for thing in scene}
        facts |= {(a.full_name, how, b.full_name) for a in scene for b in scene if (how := relation(a, b))}
        return self.meaning <= facts


class World:
    """What exists and what is held out: every manifest asks this one object."""

    def __init__(self, seed: int = 0, num_heldout_words: int = 60, num_free_words: int = 0) -> None:
        self.seed = seed
        rng = random.Random(f"{seed}/combinations")
        # Each held-out pair has a colour and a shape of its own, so that no attribute becomes rare.
        colours, shapes = rng.sample(COLOURS, 5), rng.sample(SHAPES, 5)
        self.pairs = frozenset(zip(colours, shapes, strict=True))
        others = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in self.pairs]
        # 6 % of the triples; at most one of each sort a pair, so that no pair loses most of its places
        self.placed = frozenset((*pair, rng.choice(PLACES)) for pair in rng.sample(others, 10))
        self.related = frozenset((*pair, rng.choice(RELATIONS)) for pair in rng.sample(others, 10))
        operands = [(b, a) for a in range(20, 100) for b in range(1, 10)]
        self.operands = frozenset(rng.sample(operands, 108))  # 15 % of 720, both orders of each
        # A tenth are names, the others words that no sentence of the grammar needs.
        rng = random.Random(f"{seed}/words")
        free = [word for word in lexicon() if word not in grammar_words()]
        names = rng.sample(HE + SHE, num_heldout_words // 10)
        self.heldout_words = frozenset(rng.sample(free, num_heldout_words - len(names)) + names)
        words = [word for word in lexicon() if word not in self.heldout_words]
        # a small world has few words, each heard often enough to be learned; 0: all of them
        self.words = tuple(sorted(rng.sample(words, num_free_words)) if num_free_words else words)
        self.made_up_words = not num_free_words
        self.names = tuple(name for name in HE + SHE if name not in self.heldout_words)

    def fold(self, *parts: object) -> str:
        """Say which split something belongs to: 80 % train, 5 % val, 15 % test."""
        value = key(self.seed, "fold", *parts)
        return "train" if value < 0.8 else "val" if value < 0.85 else "test"

    def scene_fold(self, things: Iterable[Thing]) -> str:
        """Say which split a scene belongs to: the things decide, not where they are, so that all its captions agree."""
        return self.fold(*sorted(thing.full_name for thing in things))

    def caption_fold(self, caption: Caption) -> str:
        """Say which split a caption belongs to: that of every scene it may describe."""
        return self.scene_fold(thing for clause in caption.clauses for thing in clause.things())

    def operands_held_out(self, a: int, b: int) -> bool:
        """Say whether two numbers are never added or subtracted in training."""
        return (min(a, b), max(a, b)) in self.operands

    def relation_held_out(self, first: Thing, how: str, second: Thing) -> bool:
        """Say whether `first how second` holds a held-out combination, in either direction."""
        return (first.colour, first.shape, how) in self.related or (
            second.colour, second.shape, INVERSE[how]
        ) in self.related  # fmt: skip

    def held_out_things(self, scene: Scene) -> list[Thing]:
        """Return the things of a scene that stand in a held-out combination."""
        found = []
        for thing in scene:
            pair = (thing.colour, thing.shape)
            ways = {how for other in scene if (how := relation(thing, other))}
            if (
                pair in self.pairs
                or (*pair, PLACES[thing.place]) in self.placed
                or any((*pair, way) in self.related for way in ways)
            ):
                found.append(thing)
        return found

    def caption_held_out(self, caption: Caption) -> bool:
        """Say whether the words of a caption, true or not, put a held-out combination before the reader."""
        placed = tuple(clause.thing for clause in caption.clauses if clause.other is None)
        stated = [clause for clause in caption.clauses if clause.other is not None]
        if self.held_out_things(placed):
            return True
        return any((thing.colour, thing.shape) in self.pairs for clause in stated for thing in clause.things()) or any(
            self.relation_held_out(clause.thing, clause.relation, clause.other)
            for clause in stated
            if clause.relation and clause.other
        )

    # ------------------------------------------------------------------------------------------------- making things

    def draw_scene(self, rng: random.Random, split: str, combination: bool = False, count: int = 0) -> Scene:
        """Draw a scene of a split; with `combination`, one that training never shows a part of."""
        while True:
            number = count or rng.choices((1, 2, 3), (22, 39, 39))[0]
            scene = random_scene(rng, number)
            if combination:
                scene = self._plant(rng, scene)
                if len({thing.name for thing in scene}) == number and self.held_out_things(scene):
                    return scene
            elif not self.held_out_things(scene) and self.scene_fold(scene) == split:
                return scene

    def _plant(self, rng: random.Random, scene: Scene) -> Scene:
        """Exchange one thing of a scene for one that is likely to make a held-out combination."""
        sort = rng.choice(("pair", "pair", "place", "relation"))
        held_out: Iterable[tuple[str, ...]] = {"pair": self.pairs, "place": self.placed, "relation": self.related}[sort]
        chosen = rng.choice(sorted(held_out))
        target = rng.randrange(len(scene))
        place = PLACES.index(chosen[2]) if sort == "place" else scene[target].place
        if any(other.place == place for i, other in enumerate(scene) if i != target):
            return scene  # the cell is taken: the caller draws again
        thing = replace(scene[target], colour=chosen[0], shape=chosen[1], place=place)
        return tuple(sorted((*scene[:target], thing, *scene[target + 1 :])))

    def draw_described(self, rng: random.Random, split: str, combination: bool = False) -> tuple[Scene, Caption]:
        """Draw a scene with a caption; a third of the captions names a relation."""
        related = rng.random() < 0.33
        while True:
            scene = self.draw_scene(rng, split, combination)
            caption = random_caption(rng, scene, related)
            if related == any(clause.other is not None for clause in caption.clauses) and (
                not combination or self.caption_held_out(caption)
            ):
                return scene, caption

    def wrong_captions(
        self,
        rng: random.Random,
        caption: Caption,
        scene: Scene,
        split: str,
        prefer: Sequence[Thing] = (),
        kinds: Sequence[str] = CHANGES,
    ) -> dict[str, str]:
        """Return false captions by the one thing they change; place or relation only where the caption states one.

        What training denies, too, holds nothing that is held out; `split` is "any" where the caption itself does.
        """
        found = {}
        for kind in kinds:
            edits = changes(caption, kind, prefer)
            rng.shuffle(edits)
            for edit in edits:
                wrong = edited(caption, *edit)
                allowed = split == "any" or not self.caption_held_out(wrong)
                if allowed and split == "train":
                    allowed = self.caption_fold(wrong) == split
                if allowed and not wrong.fits(scene):
                    found[kind] = wrong.text
                    break
        return found


def random_scene(rng: random.Random, count: int) -> Scene:
    """Draw a scene of distinct things, held out or not."""
    while True:
        places = sorted(rng.sample(range(4), count))
        scene = tuple(Thing(place, rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(SIZES)) for place in places)
        if len({thing.name for thing in scene}) == count:
            return scene


def random_caption(rng: random.Random, scene: Scene, related: bool) -> Caption:
    """Describe a scene in one of the forms and in any order; `related`: by a relation, if two things are neighbours."""
    things = rng.sample(scene, len(scene))
    neighbours = [(a, b) for a, b in combinations(things, 2) if relation(a, b)]
    if related and neighbours:
        first, second = rng.choice(neighbours)
        rest = [Clause(thing) for thing in things if thing not in (first, second)]
        clauses = (Clause(first, relation(first, second), second), *rest)
        return Caption(clauses, rng.choice((0, 0, 1, 2)))
    return Caption(tuple(Clause(thing) for thing in things), rng.choice((0, 0, 1, 2, 3)))


Edit = tuple[Thing, Thing] | tuple[Clause, Clause]  # what is to be put for what


def changes(caption: Caption, kind: str, prefer: Sequence[Thing] = ()) -> list[Edit]:
    """Return all ways to get one attribute, place or relation wrong; of preferred things, if it has any."""
    if kind == "relation":
        return [(c, replace(c, relation=INVERSE[c.relation])) for c in caption.clauses if c.relation is not None]
    things = [thing for clause in caption.clauses for thing in clause.things()]
    names = {thing.name for thing in things}
    found: list[Edit] = []
    for thing in [thing for thing in things if thing in prefer] or things:
        if kind == "place":
            stated = any(clause.thing == thing and clause.other is None for clause in caption.clauses)
            free = set(range(4)) - {other.place for other in things} if stated else set()
            found += [(thing, replace(thing, place=place)) for place in sorted(free)]
            continue
        values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[kind]
        for value in values:
            new = Thing(
                thing.place, **{"colour": thing.colour, "shape": thing.shape, "size": thing.size} | {kind: value}
            )
            if new != thing and (new.name == thing.name or new.name not in names):
                found.append((thing, new))
    return found


def edited(caption: Caption, old: Thing | Clause, new: Thing | Clause) -> Caption:
    """Put one thing or clause for another in a caption."""

    def edit(clause: Clause) -> Clause:
        if isinstance(new, Clause):
            return new if clause == old else clause
        return replace(
            clause,
            thing=new if clause.thing == old else clause.thing,
            other=new if clause.other == old else clause.other,
        )

    return replace(caption, clauses=tuple(edit(clause) for clause in caption.clauses))
