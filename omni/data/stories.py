"""Plain language of the micro-world: stories, talk, facts, stage A's documents, and sentences to be spoken."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from omni.data.lexicon import (
    COLOURS,
    DAYS,
    ECHOES,
    FACT_QUESTIONS,
    FACTS,
    FOODS,
    FURNITURE,
    HE,
    MONTHS,
    NUMBERS,
    OBJECTS,
    ORDINALS,
    PET_NAMES,
    PETS,
    ROOMS,
    SHE,
    SOUNDS,
    STATEMENTS,
    STORIES,
    STORY_QUESTIONS,
    STORY_REQUESTS,
    TALK,
    THING_COLOURS,
    WORD_FRAMES,
    letter_followers,
    lexicon,
    number_words,
)
from omni.data.questions import (
    ARITHMETIC,
    CLOSED,
    IN_CONTEXT,
    Question,
    arithmetic_statement,
    closed_facts,
    operands,
    person_questions,
    word_question,
    written_scene,
)
from omni.data.world import World, fix_articles, normalize

Turns = list[tuple[str, str]]  # what the user says, what the assistant answers


# ------------------------------------------------------------------------------------------------------------- stories


def story_words(world: World, rng: random.Random) -> dict[str, str]:
    """Draw the people, things and places of a story or a talk."""
    a, b = rng.sample(world.names, 2)
    (o, r), (c, d), (p, q) = rng.sample(OBJECTS, 2), rng.sample(COLOURS, 2), rng.sample(ROOMS, 2)
    day = rng.randrange(7)
    pet = rng.choice(PETS)
    animal = rng.choice([animal for animal in SOUNDS if animal != pet])
    return {
        "a": a, "b": b, "he": "he" if a in HE else "she", "his": "his" if a in HE else "her", "o": o, "r": r,
        "c": c, "d": d, "p": p, "q": q, "day": DAYS[day], "next_day": DAYS[(day + 1) % 7],
        "furniture": rng.choice(FURNITURE), "food": rng.choice(FOODS), "pet": pet,
        "pet_name": rng.choice(PET_NAMES), "pet_sound": SOUNDS[pet],
        "animal": animal, "sound": SOUNDS[animal],
    }  # fmt: skip


def tell(rng: random.Random, plot: str, words: dict[str, str]) -> list[str]:
    """Tell a story: one sentence a step."""
    sentences = [rng.choice(step).format(**words) for step in STORIES[plot]]
    return [fix_articles(sentence) for sentence in sentences if sentence]


def story_request(rng: random.Random, plot: str, words: dict[str, str]) -> str:
    """Ask for the story by somebody or something in it."""
    subjects = {
        "gift": ("{a} and {b}", "a {c} {o}"),
        "lost": ("{a} and a {o}", "a {c} {o}"),
        "trade": ("{a} and {b}", "a {o} and a {r}"),
        "pet": ("{a} and a {pet}", "a {pet} called {pet_name}"),
        "moved": ("{a} and a {o}", "a {c} {o}"),
        "night": ("{a} and a {animal}", "a {animal} in the night"),
        "race": ("a {animal} and a {pet}",),
        "letter": ("a letter to {b}", "{a} and {b}"),
    }
    subject = rng.choice(subjects[plot]).format(**words)
    return fix_articles(rng.choice(STORY_REQUESTS).format(subject=subject))


def story_chat(world: World, rng: random.Random) -> Turns:
    """Ask for a story and get it."""
    words, plot = story_words(world, rng), rng.choice(list(STORIES))
    return [(story_request(rng, plot, words), " ".join(tell(rng, plot, words)))]


def talk(world: World, rng: random.Random, kind: str) -> Turns:
    """Exchange a greeting or small talk."""
    said, answers = rng.choice(TALK[kind])
    words = story_words(world, rng)
    return [(rng.choice(said).format(**words), fix_articles(rng.choice(answers).format(**words)))]


def echo(world: World, rng: random.Random, split: str) -> Turns:
    """Ask for words again, mostly in any order of theirs: only who looks them up can say them.

    In all other text most of the next word is grammar, and looking up pays late. Here nothing else pays. Transcription
    is the same skill: stage E asks for it after the words, and so do some of these.
    """
    if rng.random() < 0.3:
        said = grammar_sentence(world, rng, split)
    else:
        words = rng.sample((*world.words, *world.names, *OBJECTS, *COLOURS, *NUMBERS), rng.randint(2, 12))
        said = " ".join(words) + "."
    return [(rng.choice(ECHOES).format(words=said), said)]


# ---------------------------------------------------------------------------------------------------- stage A documents


def chat_document(turns: Turns) -> str:
    """Write a chat in the template of the Thinker, with a space before what is said (`tokenizer.turn_text`)."""
    return "".join(f"<|user|> {said}<|end|><|assistant|> {answer}<|end|>" for said, answer in turns)


def fact_words(world: World, rng: random.Random) -> dict[str, str]:
    """Draw one of each closed list of the facts."""
    month = rng.randrange(12)
    thing = rng.choice(list(THING_COLOURS))
    word = rng.choice([word for word in world.words if len(word) <= 6] if rng.random() < 0.8 else world.names)
    return {
        "month": MONTHS[month], "ordinal": ORDINALS[month], "next_month": MONTHS[(month + 1) % 12],
        "thing": thing, "colour": THING_COLOURS[thing], "word": word, "letters": " ".join(word),
    }  # fmt: skip


def fact_statement(world: World, rng: random.Random, split: str) -> str:
    """State something true of numbers, days, animals, colours or spelling."""
    kind = rng.choice((*ARITHMETIC, *ARITHMETIC, *CLOSED, "fact", "fact", "fact"))
    if kind in ARITHMETIC:
        return arithmetic_statement(world, rng, kind, split)
    if kind == "fact":
        return rng.choice(FACTS).format(**fact_words(world, rng))
    x, y = rng.choice(closed_facts(kind))
    return fix_articles(rng.choice(STATEMENTS[kind]).format(x=x, y=y))


def _digits(world: World, rng: random.Random) -> tuple[str, str]:
    """Ask for a sum or a difference in digits."""
    kind = rng.choice(ARITHMETIC)
    a, b = operands(world, rng, kind, "train")
    return (f"what is {a} plus {b}?", str(a + b)) if kind == "add" else (f"what is {a} minus {b}?", str(a - b))


def document(world: World, rng: random.Random, split: str) -> str:
    """Draw one document of stage A. `split` is train, val or test; only the scenes in it differ by split."""
    shares = {
        "scene": 28, "captions": 3, "story": 8, "story_qa": 3, "people": 14, "numbers": 20, "sums": 8, "facts": 3,
        "closed": 14, "talk": 4, "echo": 12,
    }  # fmt: skip
    kind = rng.choices(list(shares), list(shares.values()))[0]
    if kind == "scene":
        return _scene_document(world, rng, split)
    if kind == "captions":
        captions = [world.draw_described(rng, split)[1].text for _ in range(rng.randint(2, 4))]
        return ". ".join(captions) + "."
    if kind in ("story", "story_qa"):
        words, plot = story_words(world, rng), rng.choice(list(STORIES))
        told = " ".join(tell(rng, plot, words))
        if kind == "story":
            return told if rng.random() < 0.6 else chat_document([(story_request(rng, plot, words), told)])
        asked = [(q.format(**words), fix_articles(a.format(**words))) for q, a in STORY_QUESTIONS[plot]]
        rng.shuffle(asked)
        return chat_document([(f"{told} {asked[0][0]}", asked[0][1]), *asked[1:2]])
    if kind == "echo":
        return chat_document(echo(world, rng, split))
    if kind == "people":
        return _people_document(world, rng)
    if kind == "talk":
        return chat_document(talk(world, rng, "greeting") + talk(world, rng, "small_talk"))
    if kind == "sums":
        return stated_sums(world, rng)
    if kind == "facts":
        return " ".join(fact_statement(world, rng, "train") for _ in range(rng.randint(3, 5)))
    return chat_document(list(short_questions(world, rng, kind)))


def _scene_document(world: World, rng: random.Random, split: str) -> str:
    """Write a scene and ask several questions about it; now and then the spoken short form."""
    if rng.random() < 0.12:
        kinds = ("scene_color", "scene_shape", "scene_size", "scene_place", "scene_relation")
        question = word_question(world, rng, rng.choice(kinds), split)
        return chat_document([(question.full_text, question.answer)])
    context, asked = written_scene(world, rng, split)
    return chat_document(turns_about(rng, several_questions(rng, asked, rng.randint(6, 9)), context))


def _people_document(world: World, rng: random.Random) -> str:
    """Say who has what and ask everything about it, or twice the spoken short form of one kind of question."""
    if rng.random() < 0.5:
        asked = person_questions(world, rng, IN_CONTEXT)
        return chat_document(turns_about(rng, [question for some in asked.values() for question in some]))
    turns: Turns = []
    for kind in rng.sample(IN_CONTEXT, 2):
        turns += turns_about(rng, person_questions(world, rng, (kind,), spoken=True)[kind])
    return chat_document(turns)


def several_questions(rng: random.Random, asked: dict[str, list[Question]], count: int) -> list[Question]:
    """Choose among the questions about a scene: one of every template, then any others.

    Many questions about one scene teach to look things up sooner than few about many: the scene is read once.
    """
    first = [rng.choice(questions) for _, questions in sorted(asked.items())]
    rest = [question for _, questions in sorted(asked.items()) for question in questions if question not in first]
    rng.shuffle(first)
    return (first + rng.sample(rest, len(rest)))[:count]


def turns_about(rng: random.Random, questions: list[Question], context: str = "") -> Turns:
    """Ask several questions about what is said once, before the first of them."""
    chosen = rng.sample(questions, len(questions))
    turns = [(question.text, question.answer) for question in chosen]
    return [(f"{context or chosen[0].context} {turns[0][0]}".strip(), turns[0][1]), *turns[1:]]


def stated_sums(world: World, rng: random.Random) -> str:
    """State sums and differences, one after another."""
    return " ".join(arithmetic_statement(world, rng, rng.choice(ARITHMETIC), "train") for _ in range(20))


def short_questions(world: World, rng: random.Random, kind: str) -> Iterator[tuple[str, str]]:
    """Yield turns about numbers or closed facts."""
    for _ in range(rng.randint(5, 8)):
        if kind == "numbers":
            if rng.random() < 0.2:
                yield _digits(world, rng)
                continue
            question = word_question(world, rng, rng.choice(ARITHMETIC), "train")
        elif rng.random() < 0.35:
            said, answer = rng.choice(FACT_QUESTIONS)
            words = fact_words(world, rng)
            yield said.format(**words), answer.format(**words)
            continue
        else:
            question = word_question(world, rng, rng.choice(CLOSED), "train")
        yield question.full_text, question.answer


def units(document_text: str) -> set[str]:
    """Return what may coincide with a held-out sentence: runs of up to four sentences, normalized, of every turn."""
    found = set()
    for turn in re.split(r"<\|\w+\|>|\n", document_text):
        sentences = [normalize(part) for part in re.split(r"[.?]", turn.removeprefix("scene: ")) if part.strip()]
        for length in range(1, 5):
            for i in range(len(sentences) - length + 1):
                found.add(" ".join(sentences[i : i + length]))
    return found


# ---------------------------------------------------------------------------------------------- sentences to be spoken


def free_sentence(world: World, rng: random.Random, shortest: int = 1) -> str:
    """Draw speech that no grammar predicts: words in any order, names, spelled words, numbers, words being named."""
    kind = rng.choices(("words", "names", "spelled", "numbers", "named"), (60, 8, 10, 12, 10))[0]
    if kind == "words":
        return " ".join(free_word(world, rng) for _ in range(rng.choice((2, 3, 4, 4, 5, 5, 6, 7, 8)))) + "."
    if kind == "names":
        return " ".join(rng.sample(world.names, rng.randint(2, 4))) + "."
    if kind == "spelled":
        return " ".join(rng.choice([word for word in world.words if len(word) <= 6])) + "."
    if kind == "named":
        return _named(rng, 1, lambda: free_word(world, rng))
    number = rng.randint(shortest, 3)
    return ", ".join(number_words(rng.randrange(rng.choice((21, 100, 1000)))) for _ in range(number)) + "."


def free_word(world: World, rng: random.Random) -> str:
    """Draw a word; where all of the lexicon is spoken, half are made up.

    Who has heard words that do not exist can spell, and speak, words that were never heard.
    """
    if world.made_up_words and rng.random() < 0.5:
        return made_up_word(world, rng)
    return rng.choice(world.words)


def made_up_word(world: World, rng: random.Random) -> str:
    """Draw a word that does not exist, each letter by the two before it, as in the words of the lexicon."""
    followers = letter_followers()
    while True:
        word = "  "
        while not word.endswith(".") and len(word) < 13:
            word += rng.choice(followers[word[-2:]])
        word = word.strip(" .")
        if 4 <= len(word) <= 9 and word not in world.heldout_words and word not in lexicon():
            return word


def grammar_sentence(world: World, rng: random.Random, split: str, shortest: int = 1, longest: int = 18) -> str:
    """Draw a sentence of the grammar, or a few, within limits of words.

    What is kept for a test is never said in training, so tests draw only what has many values: a greeting that were
    held out could not be learned at all.
    """
    kinds = ["caption", "story", "story", "sum", "people"]
    kinds += ["fact", "question", "talk"] if split == "train" else []
    while True:
        text = _sentence(world, rng, rng.choice(kinds), split, longest > 18)
        telling = split == "train" or any(word in TELLING for word in normalize(text).split())
        if telling and shortest <= len(text.split()) <= longest:
            return text


TELLING = frozenset((*HE, *SHE, *OBJECTS, *COLOURS, *NUMBERS))


def _sentence(world: World, rng: random.Random, kind: str, split: str, long: bool) -> str:
    """Draw one sentence of a kind, or several if it shall be long."""
    if kind == "caption":
        return world.draw_described(rng, split)[1].text + "."
    if kind == "story":
        sentences = tell(rng, rng.choice(list(STORIES)), story_words(world, rng))
        start, number = rng.randrange(len(sentences)), rng.choice((2, 3, 4)) if long else 1
        return " ".join(sentences[start : start + number])
    if kind == "sum":
        number = 3 if long else 1
        return " ".join(arithmetic_statement(world, rng, rng.choice(ARITHMETIC), "train") for _ in range(number))
    if kind == "fact":
        return " ".join(fact_statement(world, rng, "train") for _ in range(3 if long else 1))
    if kind in ("people", "question"):
        asked = word_question(world, rng, rng.choice(IN_CONTEXT), "train", spoken=not long)
        return (
            asked.text if kind == "question" else asked.context if long else rng.choice((asked.sentence, asked.context))
        )
    said, answer = talk(world, rng, rng.choice(("greeting", "small_talk")))[0]
    return f"{said} {answer}" if long else rng.choice((said, answer))


def unheard_sentence(world: World, rng: random.Random, words: Iterator[str], length: int) -> str:
    """Name words that were never heard, in frames that were: `length` 0, 1, 2 for about 5, 10 or 20 words."""
    return _named(rng, (1, 2, 4)[length], words.__next__)


def _named(rng: random.Random, number: int, word: Callable[[], str]) -> str:
    """Draw sentences that name words."""
    frames = rng.sample(WORD_FRAMES, number)
    return " ".join(re.sub(r"\{\w\}", lambda _: word(), frame) for frame in frames)
