"""Lists to sort, count, reverse and search, and strings to copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from world import words
from world.document import Document, exercise, story

POOLS: tuple[Sequence[str], ...] = (
    words.FIRST_NAMES,
    words.THINGS,
    words.COLOURS,
    words.FOODS,
    words.ANIMALS,
    words.JOBS,
)
TRANSFORMS: dict[str, Callable[[list[str]], str]] = {
    "Sort: {items}": lambda items: ", ".join(sorted(items)),
    "Put these in order of the alphabet: {items}": lambda items: ", ".join(sorted(items)),
    "Reverse the list: {items}": lambda items: ", ".join(reversed(items)),
    "How many words are in this list? {items}": lambda items: str(len(items)),
    "Count: {items}": lambda items: words.spell(len(items)),
    "What comes first? {items}": lambda items: items[0],
    "What comes last? {items}": lambda items: items[-1],
    "Which is the second word? {items}": lambda items: items[1],
    "Join with and: {items}": lambda items: " and ".join(items),
    "Make a numbered list: {items}": lambda items: "\n".join(
        f"{place}. {item}" for place, item in enumerate(items, start=1)
    ),
    "Make a bullet list: {items}": lambda items: "\n".join(f"- {item}" for item in items),
}


def listing(rng: Random) -> Document:
    """A list of words, and the list sorted, counted, reversed or searched."""
    items = rng.sample(rng.choice(POOLS), rng.randint(2, 6))
    request = rng.choice(tuple(TRANSFORMS))
    prompt = request.format(items=", ".join(items))
    return exercise(rng, prompt, TRANSFORMS[request](items), " ".join(sorted(items)))


def sorted_numbers(rng: Random) -> Document:
    numbers = rng.sample(range(1000), rng.randint(2, 5))
    given = ", ".join(map(str, numbers))
    answer = ", ".join(map(str, sorted(numbers)))
    return exercise(rng, f"Sort the numbers: {given}", answer, given)


def copying(rng: Random) -> Document:
    """A string without meaning, to be said again."""
    text = _nonsense(rng)
    request = rng.choice(("Repeat: {}", "Say this back to me: {}", "Copy the line.\n{}"))
    return exercise(rng, request.format(text), text, text)


def lookup(rng: Random) -> Document:
    """Pairs of invented words and signs, and the partner of one of them."""
    joint = rng.choice((": ", " = ", " -> ", " is ", " / "))
    keys = list(dict.fromkeys(words.invented(rng) for _ in range(rng.randint(2, 6))))
    pairs = {key: _value(rng) for key in keys}
    table = "\n".join(f"{key}{joint}{value}" for key, value in pairs.items())
    asked = rng.choice(keys)
    return exercise(rng, f"{table}\n\nWhat stands by {asked}?", pairs[asked], table)


def table(rng: Random) -> Document:
    """A small table with bars between its columns."""
    names = rng.sample(words.FIRST_NAMES, rng.randint(2, 4))
    lines = [f"| {name} | {rng.choice(words.FOODS)} | {rng.randint(1, 99)} |" for name in names]
    text = "\n".join(["| name | food | number |", *lines])
    return story(text, text)


def notes(rng: Random) -> Document:
    """Lines of words and signs as on a slip of paper, often repeated below."""
    lines = [_nonsense(rng) for _ in range(rng.randint(1, 3))]
    text = "\n".join(lines * 2 if rng.random() < 0.6 else lines)
    return story(f"Note:\n{text}", text)


def _nonsense(rng: Random) -> str:
    pieces = [_piece(rng) for _ in range(rng.randint(2, 8))]
    return rng.choice((" ", " ", " ", ", ")).join(pieces)


def _piece(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return words.invented(rng)
    if kind < 0.6:
        return rng.choice(rng.choice(POOLS))
    if kind < 0.7:
        return f"{words.town(rng)}{rng.choice(words.SIGNS)}"
    if kind < 0.85:
        return rng.choice(words.SIGNS)
    return str(rng.randint(0, 9999))


def _value(rng: Random) -> str:
    return rng.choice((words.invented(rng), str(rng.randint(0, 999)), rng.choice(words.THINGS)))
