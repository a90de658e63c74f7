"""The words and phrases of the micro-world, as data: no sentence is written anywhere else.

All of it is here so that `grammar_words` can say which words the grammar needs; only other words can be held out.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words: a quarter of the length of a tuple of strings."""
    return tuple(text.split())


COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("big", "small")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # a 2 x 2 grid, row by row
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(INVERSE)
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
MONTHS = _words("january february march april may june july august september october november december")
ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
HE = _words(
    "tom ben sam max leo dan jack adam oscar peter henry felix hugo simon david lucas oliver martin victor robert "
    "jacob arthur edward frank george"
)
SHE = _words(
    "mary anna lucy emma ella nina rosa kate julia clara alice sara maria laura helen diana nora olivia sophie hannah "
    "linda karen martha paula susan"
)
OBJECTS = _words("ball kite hat cup book box car pen bag doll boat lamp key coat drum bike")
OPPOSITES = tuple(
    (pair.split("/")[0], pair.split("/")[1])
    for pair in _words(
        "big/small hot/cold up/down day/night left/right fast/slow old/young happy/sad open/closed full/empty "
        "hard/soft high/low light/dark long/short loud/quiet near/far rich/poor strong/weak thick/thin wet/dry "
        "wide/narrow early/late good/bad clean/dirty in/out first/last true/false push/pull start/stop "
        "win/lose begin/end give/take buy/sell love/hate ask/answer always/never sweet/sour inside/outside "
        "above/below north/south east/west"
    )
)
SOUNDS = dict(
    pair.split("/")
    for pair in _words(
        "dog/woof cat/meow cow/moo duck/quack sheep/baa pig/oink bee/buzz lion/roar snake/hiss bird/tweet owl/hoot "
        "frog/croak horse/neigh mouse/squeak wolf/howl hen/cluck bear/growl crow/caw"
    )
)
PETS = _words("dog cat duck pig bird frog horse mouse hen sheep")
PET_NAMES = _words("rex bella coco lucky spot fluffy ruby milo pepper daisy")
FOODS = _words("bread milk corn soup cheese rice fish apples carrots")
ROOMS = tuple(f"the {room}" for room in _words("garden kitchen park forest library barn school attic"))
FURNITURE = _words("table chair bench bed blanket tree")
_THINGS = {
    "yellow": "the sun|a banana|a lemon",
    "green": "grass|a leaf|a cucumber",
    "blue": "the sky|the ocean",
    "white": "snow|milk|a cloud|a swan",
    "black": "coal|a crow",
    "red": "a strawberry|a tomato|a cherry|a fire truck",
    "orange": "a carrot|a pumpkin",
    "purple": "a plum|lavender",
}
THING_COLOURS = {thing: colour for colour, things in _THINGS.items() for thing in things.split("|")}

# ------------------------------------------------------------------------------------------ questions about a picture
# {it} is "the circle", "the red circle" or "the red one"; {place} a place; {thing} "red circle".
PICTURE_QUESTIONS = {
    "count": ("how many shapes are there?", "how many shapes do you see?", "how many shapes can you count?"),
    "color": ("what color is {it}?", "what is the color of {it}?", "which color does {it} have?"),
    "shape": ("what shape is {it}?", "what is the shape of {it}?", "which shape is {it}?"),
    "size": ("is {it} big or small?", "what size is {it}?", "how big is {it}?"),
    "place": ("where is {it}?", "in which corner is {it}?", "where do you see {it}?"),
    "exists": ("is there {thing}?", "do you see {thing}?", "can you find {thing}?"),
    "relation": ("is {it} {relation} {other}?", "do you see {it} {relation} {other}?"),
    "at_place": ("what is at the {place}?", "what do you see at the {place}?", "what is in the {place} corner?"),
    "neighbor": ("what is {relation} {other}?", "which thing is {relation} {other}?"),
}
# Short scenes to be spoken: one thing, or two that stand to each other.
SPOKEN_SCENES = {
    "scene_color": "what color is the {shape}?",
    "scene_shape": "what shape is the {colour} one?",
    "scene_size": "is the {colour} {shape} big or small?",
    "scene_place": "where is the {colour} {shape}?",
    "scene_relation": "is the {shape} {relation} the {other}?",
}

# ------------------------------------------------------------------------------------------------ questions in words
QUESTIONS = {
    "add": ("what is {a} plus {b}?", "how much is {a} plus {b}?", "can you add {a} and {b}?"),
    "subtract": ("what is {a} minus {b}?", "how much is {a} minus {b}?", "can you take {b} away from {a}?"),
    # of each fact one wording is kept for the test: what a wording means has to be learned from other facts
    "successor": (
        "what number comes after {x}?",
        "which number follows {x}?",
        "what is the next number after {x}?",
        "what do you count after {x}?",
        "which number is right after {x}?",
        "{x}, and what number then?",
    ),
    "predecessor": (
        "what number comes before {x}?",
        "which number is right before {x}?",
        "what is the last number before {x}?",
        "what do you count before {x}?",
        "{x} is the number after what?",
        "which number does {x} follow?",
    ),
    "day_after": (
        "what day comes after {x}?",
        "which day follows {x}?",
        "if today is {x}, what day is tomorrow?",
        "what is the next day after {x}?",
        "which day is right after {x}?",
        "{x}, and what day then?",
    ),
    "day_before": (
        "what day comes before {x}?",
        "which day is right before {x}?",
        "if today is {x}, what day was yesterday?",
        "what is the last day before {x}?",
        "{x} is the day after what?",
        "which day does {x} follow?",
    ),
    "opposite": (
        "what is the opposite of {x}?",
        "can you tell me the opposite of {x}?",
        "{x} is the opposite of what?",
        "which word is the opposite of {x}?",
        "what is not {x}, but the opposite?",
        "do you know the opposite of {x}?",
    ),
    "sound": (
        "what sound does a {x} make?",
        "what does a {x} say?",
        "can you tell me the sound of a {x}?",
        "which sound do you hear from a {x}?",
        "do you know what a {x} says?",
        "what is the sound of a {x}?",
    ),
}
STATEMENTS = {
    "add": ("{a} plus {b} is {y}.", "{a} plus {b} makes {y}.", "if you add {a} and {b}, you get {y}."),
    "subtract": ("{a} minus {b} is {y}.", "{a} minus {b} leaves {y}.", "if you take {b} away from {a}, you get {y}."),
    "successor": ("after {x} comes {y}.", "the number after {x} is {y}."),
    "predecessor": ("before {x} comes {y}.", "the number before {x} is {y}."),
    "day_after": ("after {x} comes {y}.", "the day after {x} is {y}."),
    "day_before": ("before {x} comes {y}.", "the day before {x} is {y}."),
    "opposite": ("the opposite of {x} is {y}.", "{x} is the opposite of {y}."),
    "sound": ("a {x} says {y}.", "the sound of a {x} is {y}."),
}
# What somebody has, for questions that only who heard the sentence can answer.
OWNING = ("{a} has {thing}.", "{a} found {thing}.", "{a} bought {thing}.", "{a} holds {thing}.")
PERSON_QUESTIONS = {
    "person_color": (
        "what color is the {object}?",
        "which color does the {object} have?",
        "what is the color of the {object}?",
    ),
    "person_object": ("what does {a} have?", "which thing does {a} have?", "can you tell me what {a} has?"),
    "who_has": ("who has the {object}?", "who is the one with the {object}?", "can you tell me who has the {object}?"),
}
SPOKEN_COLOURS = ("the {o} is {c}.", "{a}'s {o} is {c}.", "there is a {c} {o}.")
FACTS = (
    "{month} is the {ordinal} month of the year.",
    "{thing} is {colour}.",
    "there are seven days in a week.",
    "there are twelve months in a year.",
    "{word} is spelled {letters}.",
)
FACT_QUESTIONS = (
    ("what is the {ordinal} month of the year?", "{month}"),
    ("which month comes after {month}?", "{next_month}"),
    ("what color is {thing}?", "{colour}"),
    ("how do you spell {word}?", "{letters}"),
    ("how many days are in a week?", "seven"),
    ("how many months are in a year?", "twelve"),
)
REQUESTS = {
    "caption": "describe the picture.",
    "asr": "write down what you hear.",
}

# ------------------------------------------------------------------------------------------------- talk and stories
# A story is a list of steps; a step is one of several sentences ("" leaves it out). A question about it may follow.
# {a} and {b} are people, {he} and {his} go with {a}; {o} is an object, {c} its color; {p} and {q} are places.
STORIES = {
    "gift": (
        ("{a} had a {c} {o}.", "one day {a} got a {c} {o}.", "{a} found a {c} {o} in {p}."),
        ("{he} took the {o} to {q}.", "{a} went to {q} with the {o}."),
        ("there {he} met {b}.", "{b} was there too.", "{he} saw {b} and said hello."),
        ("{b} liked the {o} very much.", "{b} wanted to have the {o}.", "{b} said, what a nice {o}."),
        ("so {a} gave the {o} to {b}.", "{a} gave it to {b} and smiled."),
        ("now {b} has the {o}.", "{b} said thank you and went home with the {o}.", "{b} was very happy with the {o}."),
    ),
    "lost": (
        ("{a} lost a {c} {o}.", "one day {a} could not find the {c} {o}.", "the {c} {o} of {a} was gone."),
        ("{he} looked in {p}, but the {o} was not there.", "{a} looked for it in {p}, but it was not there."),
        ("", "{a} was sad.", "{b} came to help."),
        ("then {he} went to {q}.", "then {a} looked in {q}."),
        ("there was the {o}, under a {furniture}.", "the {o} was there, behind a {furniture}."),
        ("{a} was very happy.", "{a} took the {o} and went home.", "now {a} has the {o} again."),
    ),
    "trade": (
        ("{a} had a {c} {o}.", "{a} came to {p} with a {c} {o}."),
        ("{b} had a {d} {r}.", "{b} came with a {d} {r}."),
        ("{a} wanted the {r} and {b} wanted the {o}.", "each of them liked what the other had."),
        ("so {a} gave the {o} to {b}, and {b} gave the {r} to {a}.",),
        ("now {a} has the {r} and {b} has the {o}.", "now the {o} belongs to {b} and the {r} belongs to {a}."),
        ("", "both were happy.", "then they went home."),
    ),
    "pet": (
        ("{a} had a {pet}.", "there was a {pet} that lived with {a}."),
        ("the {pet} was called {pet_name}.", "its name was {pet_name}."),
        ("one morning {pet_name} was hungry.", "one evening {pet_name} wanted to eat."),
        ("{a} gave it some {food}.", "{a} went to the kitchen and came back with some {food}."),
        ("{pet_name} ate the {food} and slept.", "{pet_name} ate it all.", "{pet_name} said {pet_sound} and ate."),
        ("", "{a} went to sleep too.", "then {a} and {pet_name} played in {p}."),
    ),
    "moved": (
        ("the {c} {o} was in {p}.", "there was a {c} {o} in {p}."),
        ("{a} took the {o} and went to {q}.", "{a} came and carried the {o} to {q}."),
        ("{he} put it on a {furniture} and went home.", "there {he} put it down."),
        ("", "{b} did not see it."),
        ("now the {o} is in {q}.", "since then the {o} is in {q}."),
    ),
    "night": (
        ("{a} could not sleep.", "{a} woke up in the night."),
        ("there was a sound outside.", "{he} heard a sound in {p}."),
        ("{he} went to the window and looked.", "{he} got up and opened the door."),
        ("it was only a {animal}.", "there sat a {animal} and looked at {a}."),
        ("the {animal} said {sound}.", "{sound}, said the {animal}."),
        ("{a} laughed and went back to bed.", "then all was quiet again.", "{a} told {b} about it the next day."),
    ),
    "race": (
        ("a {animal} and a {pet} lived in {p}.", "there were a {animal} and a {pet} in {p}."),
        ("the {animal} was fast and the {pet} was slow.",),
        ("one day they ran a race.", "one {day} they wanted to see who would win."),
        ("the {animal} ran and ran and did not stop.", "they ran from {p} to {q}."),
        ("the {animal} won the race.", "the {animal} came first and the {pet} came last."),
        ("", "the {pet} was not sad and said, well done."),
    ),
    "letter": (
        ("on {day} {a} wrote a letter to {b}.", "{a} wrote to {b} on {day}."),
        ("the letter said, please come to {p}.", "{he} asked {b} to come to {p}."),
        ("{b} read it and came the next day.", "{b} came on {next_day}."),
        ("{a} had a {c} {o} for {b}.", "there {a} showed {b} a {c} {o}."),
        ("they played with the {o} until it was dark.", "they talked and laughed all day."),
        ("", "then {b} went home."),
    ),
}  # fmt: skip
STORY_QUESTIONS = {
    "gift": (("who has the {o} now?", "{b}"), ("what color is the {o}?", "{c}"), ("who gave the {o} away?", "{a}")),
    "lost": (("what was lost?", "a {c} {o}"), ("where was the {o}?", "in {q}"), ("who lost the {o}?", "{a}")),
    "trade": (("who has the {o} now?", "{b}"), ("who has the {r} now?", "{a}"), ("what color is the {r}?", "{d}")),
    "pet": (("what did the {pet} eat?", "{food}"), ("what is the {pet} called?", "{pet_name}")),
    "moved": (
        ("where is the {o} now?", "in {q}"),
        ("who moved the {o}?", "{a}"),
        ("where was the {o} before?", "in {p}"),
    ),
    "night": (("who could not sleep?", "{a}"), ("what sat outside?", "a {animal}")),
    "race": (("who won the race?", "the {animal}"), ("who was slow?", "the {pet}")),
    "letter": (("who wrote the letter?", "{a}"), ("what color is the {o}?", "{c}")),
}
ECHOES = (
    "repeat after me: {words}",
    "please say: {words}",
    "say this again: {words}",
    "{words} say that again.",
    "{words} repeat what i said.",
    f"{{words}} {REQUESTS['asr']}",
)
STORY_REQUESTS = (
    "tell me a story about {subject}.",
    "can you tell me a story about {subject}?",
    "please tell me a short story about {subject}.",
    "i would like to hear a story about {subject}.",
)
TALK = {
    "greeting": (
        (("hello.", "hi.", "hello there."), ("hello. how can i help you?", "hi. what can i do for you?")),
        (("good morning.",), ("good morning. did you sleep well?",)),
        (("good evening.",), ("good evening. how was your day?",)),
        (("hello, my name is {a}.", "hi, i am {a}."), ("hello {a}. nice to meet you.",)),
        (("good night.", "i am going to bed."), ("good night. sleep well.",)),
        (("goodbye.", "bye.", "see you tomorrow."), ("goodbye. come back soon.",)),
        (("this is my friend {a}.", "meet my friend {a}."), ("hello {a}. it is nice to meet you.",)),
    ),
    "small_talk": (
        (("how are you?", "how are you today?"), ("i am well, thank you.",)),
        (("who are you?", "what are you?"), ("i am a small model that can read, hear, see and speak.",)),
        (("what can you do?",), ("i can look at pictures, listen to you and answer questions.",)),
        (("thank you.", "thanks a lot."), ("you are welcome.",)),
        (("i am sad.", "i am not happy today."), ("i am sorry to hear that. what happened?",)),
        (("i am happy.", "i feel good today."), ("that is good to hear.",)),
        (("i lost my {o}.", "i cannot find my {o}."), ("i hope you find your {o} soon.",)),
        (("i have a new {o}.", "look, i got a new {o}."), ("a new {o} is a nice thing to have.",)),
        (("i like my {pet}.", "my {pet} is my best friend."), ("a {pet} is a good friend.",)),
        (("{a} is my friend.", "{a} and i are friends."), ("it is good to have a friend like {a}.",)),
        (("i am going to {p}.", "tomorrow i will go to {p}."), ("have a good time in {p}.",)),
        (("can you help me?", "i need your help."), ("of course. what do you need?",)),
        (("my favorite color is {c}.", "i like the color {c}."), ("{c} is a beautiful color.",)),
    ),
}
# Frames for a word that was never heard in training.
WORD_FRAMES = (
    "the next word is {w}.",
    "can you say {w} and {w}?",
    "please write the word {w}.",
    "i said {w}, not {w}.",
    "do you know the word {w}?",
    "she said {w} again.",
    "{w} and {w} are two words.",
)  # fmt: skip


@cache
def lexicon() -> tuple[str, ...]:
    """Return the free words: common, and none that sounds like another."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


@cache
def letter_followers() -> dict[str, str]:
    """Return for every two letters of the lexicon those that come next, as often as they do; a dot ends a word."""
    found: dict[str, str] = {}
    for word in lexicon():
        letters = f"  {word}."
        for i in range(len(letters) - 2):
            found[letters[i : i + 2]] = found.get(letters[i : i + 2], "") + letters[i + 2]
    return found


@cache
def grammar_words() -> frozenset[str]:
    """Return every word that a sentence of the grammar may contain; the free lexicon only adds to them."""
    data = {name: value for name, value in globals().items() if name.isupper()}
    return frozenset(re.findall(r"[a-z]+", repr(data).lower()))


def number_words(number: int) -> str:
    """Return a number from 0 to 999 in words."""
    if number <= 20:
        return NUMBERS[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return TENS[ten - 2] + (f" {NUMBERS[one]}" if one else "")
    hundred, rest = divmod(number, 100)
    return f"{NUMBERS[hundred]} hundred" + (f" and {number_words(rest)}" if rest else "")


NUMBER_NAMES = {number_words(number): number for number in range(100)}
