"""Facts about people: told, asked for, put into other words, and written as JSON."""

from __future__ import annotations

import json
from random import Random

from world.content import Person, person
from world.document import Document, chat, exercise, story

STATEMENTS: dict[str, tuple[str, ...]] = {
    "job": (
        "{name} is {a_job}.",
        "{name} works as {a_job}.",
        "{name} has long been {a_job}.",
        "By trade {name} is {a_job}.",
        "{name} earns a living as {a_job}.",
    ),
    "town": (
        "{name} lives in {town}.",
        "The home of {name} is in {town}.",
        "{name} moved to {town}.",
        "You can find {name} in {town}.",
        "In {town} everybody knows {name}.",
    ),
    "house": (
        "{name} lives at number {house}.",
        "The door of {name} has the number {house}.",
        "{name} rents house {house}.",
    ),
    "born": (
        "{name} was born on {born}.",
        "The birthday of {name} is {born}.",
        "On {born} {name} was born.",
    ),
    "owns": (
        "{name} owns {a_thing}.",
        "{name} bought {a_thing}.",
        "{name} keeps {a_thing} at home.",
        "There is {a_thing} in the house of {name}.",
    ),
    "pet": (
        "{name} has {a_pet} called {pet}.",
        "The {animal} of {name} is called {pet}.",
        "{pet} is the {animal} of {name}.",
        "{name} feeds {a_pet} by the name of {pet}.",
    ),
    "food": (
        "{name} likes {food}.",
        "The favourite food of {name} is {food}.",
        "{name} eats {food} every day.",
        "Nobody likes {food} more than {name}.",
    ),
    "instrument": (
        "{name} plays the {instrument}.",
        "{name} learned to play the {instrument}.",
        "In the evening {name} plays the {instrument}.",
    ),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "job": ("What is the job of {name}?", "What does {name} do for a living?"),
    "town": ("Where does {name} live?", "In which town is {name} at home?"),
    "house": ("What is the house number of {name}?", "At which number does {name} live?"),
    "born": ("When was {name} born?", "What is the birthday of {name}?"),
    "owns": ("What does {name} own?", "Which thing belongs to {name}?"),
    "pet": ("What is the name of the pet of {name}?", "How is the {animal} of {name} called?"),
    "food": ("What does {name} like to eat?", "What is the favourite food of {name}?"),
    "instrument": ("What does {name} play?", "Which instrument does {name} play?"),
}
SHORT_ANSWERS = {
    "job": "{job}",
    "town": "{town}",
    "house": "{house}",
    "born": "{born}",
    "owns": "{a_thing}",
    "pet": "{pet}",
    "food": "{food}",
    "instrument": "the {instrument}",
}
JSON_REQUESTS = ("Write this as JSON.", "Give me a JSON record.", "Put the facts into JSON.")
REPHRASE_REQUESTS = ("Say it in other words.", "Put this another way.", "Rephrase this sentence.")


def biography(rng: Random) -> Document:
    """One person in two to six sentences."""
    who = person(rng)
    return story(_tell(rng, who, _attributes(rng, 2, 6)), who.name)


def neighbours(rng: Random) -> Document:
    """Two people in one text, sentence by sentence."""
    people = person(rng), person(rng)
    told = [(who, attribute) for who in people for attribute in _attributes(rng, 2, 3)]
    rng.shuffle(told)
    return story(" ".join(_state(rng, *each, "name") for each in told), *(p.name for p in people))


def question(rng: Random) -> Document:
    """A text about one or two people and a question that it answers."""
    people = [person(rng) for _ in range(rng.choice((1, 1, 2)))]
    told = [(who, attribute) for who in people for attribute in _attributes(rng, 1, 4)]
    rng.shuffle(told)
    passage = " ".join(_state(rng, *each, "name") for each in told)
    who, attribute = rng.choice(told)
    asked = rng.choice(QUESTIONS[attribute]).format(**who.slots(who.name))
    prompt = f"{passage}\n{asked}" if rng.random() < 0.8 else f"{asked}\n{passage}"
    return exercise(rng, prompt, _answer(rng, who, attribute), *(p.name for p in people))


def interview(rng: Random) -> Document:
    """A chat of several questions about one text."""
    who = person(rng)
    attributes = _attributes(rng, 2, 4)
    document = chat(_tell(rng, who, attributes), "Thank you. What do you want to know?", who.name)
    turns = document.turns
    for attribute in rng.sample(attributes, 2):
        asked = rng.choice(QUESTIONS[attribute]).format(**who.slots(who.first))
        turns += chat(asked, _answer(rng, who, attribute)).turns
    return Document(document.keys, turns)


def record(rng: Random) -> Document:
    """A text and the JSON record of what it says, fields in the order of the text or by name."""
    who = person(rng)
    attributes = _attributes(rng, 1, 4)
    fields = who.record()
    wanted = ["name", *(attributes if rng.random() < 0.5 else sorted(attributes))]
    answer = json.dumps({field: fields[field] for field in wanted})
    passage = _tell(rng, who, attributes)
    request = rng.choice(JSON_REQUESTS)
    if wanted[1:] != attributes:
        request += " Fields: " + ", ".join(wanted) + "."
    prompt = f"{request}\n{passage}" if rng.random() < 0.5 else f"{passage}\n{request}"
    return exercise(rng, prompt, answer, who.name)


def read_record(rng: Random) -> Document:
    """A JSON record, and one of its fields or a text that tells it."""
    who = person(rng)
    attributes = _attributes(rng, 1, 4)
    fields = who.record()
    text = json.dumps({field: fields[field] for field in ["name", *attributes]})
    if rng.random() < 0.5:
        sentences = " ".join(_first_statement(who, attribute) for attribute in attributes)
        return exercise(rng, f"Tell me in words: {text}", sentences, who.name)
    field = rng.choice(attributes)
    return exercise(rng, f"{text}\nWhat is the field {field}?", str(fields[field]), who.name)


def paraphrase(rng: Random) -> Document:
    """A sentence and another sentence that says the same."""
    who = person(rng)
    attribute = rng.choice(tuple(STATEMENTS))
    said, meant = rng.sample(STATEMENTS[attribute], 2)
    slots = who.slots(who.name)
    said, meant = said.format(**slots), meant.format(**slots)
    if rng.random() < 0.3:
        return story(f"{said} In other words: {meant}", who.name)
    return exercise(rng, f"{rng.choice(REPHRASE_REQUESTS)}\n{said}", meant, who.name)


def _attributes(rng: Random, least: int, most: int) -> list[str]:
    return rng.sample(tuple(STATEMENTS), rng.randint(least, most))


def _state(rng: Random, who: Person, attribute: str, called: str) -> str:
    name = who.name if called == "name" else who.first
    return rng.choice(STATEMENTS[attribute]).format(**who.slots(name))


def _first_statement(who: Person, attribute: str) -> str:
    return STATEMENTS[attribute][0].format(**who.slots(who.name))


def _tell(rng: Random, who: Person, attributes: list[str]) -> str:
    """The full name in the first sentence, the first name later."""
    called = ["name"] + [rng.choice(("name", "first", "first")) for _ in attributes[1:]]
    return " ".join(_state(rng, who, *each) for each in zip(attributes, called, strict=True))


def _answer(rng: Random, who: Person, attribute: str) -> str:
    if rng.random() < 0.5:
        return SHORT_ANSWERS[attribute].format(**who.slots(who.name))
    return _first_statement(who, attribute)
