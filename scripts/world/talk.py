"""Small talk: chats in which a later turn needs what was said before."""

from __future__ import annotations

from random import Random

from world.content import Person, person
from world.document import Document, Turn, chat

GREETINGS = ("Hello!", "Good morning.", "Hi there.", "Good evening!", "Good day.")
WELCOMES = (
    "Hello, {first}! How can I help you?",
    "Nice to meet you, {first}.",
    "Welcome, {first}!",
)
INTRODUCTIONS = (
    "My name is {name}.",
    "I am {name}.",
    "They call me {name}.",
    "I am {name}, {a_job} from {town}.",
    "My name is {name} and I live in {town}.",
)
# What the user says, what the assistant says, and the later question that asks for it again.
SMALL_TALK = (
    (
        "I like {food}.",
        "That is good to know. {food} it is.",
        "What do I like?",
        "You like {food}.",
    ),
    ("I live in {town}.", "{town} is a fine place.", "Where do I live?", "You live in {town}."),
    (
        "I play the {instrument}.",
        "I would like to hear it.",
        "What do I play?",
        "The {instrument}.",
    ),
    ("My {animal} is called {pet}.", "What a good name!", "How is my {animal} called?", "{pet}."),
    ("I bought {a_thing}.", "I hope it is a good one.", "What did I buy?", "You bought {a_thing}."),
    ("I work as {a_job}.", "That is honest work.", "What is my job?", "You are {a_job}."),
    ("I was born on {born}.", "I will remember it.", "When was I born?", "On {born}."),
)
FAREWELLS = (("Thank you!", "You are welcome."), ("Goodbye.", "Goodbye, {first}!"))


def small_talk(rng: Random) -> Document:
    """An introduction, one or two things about the user, and a question about one of them."""
    who = person(rng)
    opening = f"{rng.choice(GREETINGS)} {rng.choice(INTRODUCTIONS)}"
    turns = _exchange(who, opening, rng.choice(WELCOMES))
    topics = rng.sample(SMALL_TALK, rng.randint(1, 2))
    for said, reply, _, _ in topics:
        turns += _exchange(who, said, reply)
    if rng.random() < 0.3:
        turns += _exchange(who, "What is my name?", "Your name is {name}.")
    _, _, asked, answer = rng.choice(topics)
    turns += _exchange(who, asked, answer)
    if rng.random() < 0.3:
        turns += _exchange(who, *rng.choice(FAREWELLS))
    return Document((who.name,), turns)


def _exchange(who: Person, said: str, reply: str) -> tuple[Turn, ...]:
    slots = who.slots(who.name) | {"first": who.first}
    return chat(said.format(**slots), reply.format(**slots)).turns
