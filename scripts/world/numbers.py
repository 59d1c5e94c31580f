"""Small sums, differences and comparisons, in digits, in words and as short stories."""

from __future__ import annotations

from random import Random

from world import words
from world.document import Document, exercise, story

SUMS = (
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "{a} + {b} = ?",
    "What is the sum of {a} and {b}?",
)
DIFFERENCES = ("What is {a} minus {b}?", "Take {b} from {a}.", "{a} - {b} = ?")
COMPARISONS = ("Which is more, {a} or {b}?", "Is {a} or {b} the larger number?")


def addition(rng: Random) -> Document:
    first, second = rng.randint(0, 99), rng.randint(0, 99)
    return _exercise(rng, SUMS, first, second, first + second, f"{first}+{second}")


def subtraction(rng: Random) -> Document:
    second, first = sorted((rng.randint(0, 99), rng.randint(0, 99)))
    return _exercise(rng, DIFFERENCES, first, second, first - second, f"{first}-{second}")


def comparison(rng: Random) -> Document:
    first, second = rng.sample(range(1000), 2)
    pair = f"{first}?{second}"
    if rng.random() < 0.4:
        word = "more" if first > second else "less"
        return story(f"{first} is {word} than {second}.", pair)
    return exercise(
        rng, rng.choice(COMPARISONS).format(a=first, b=second), str(max(first, second)), pair
    )


def spelled(rng: Random) -> Document:
    """A number below one hundred, from digits to words or back."""
    number = rng.randint(0, 99)
    key = f"{number}#{rng.randint(0, 999)}"
    digits, spelling = str(number), words.spell(number)
    if rng.random() < 0.5:
        return exercise(rng, f"Write {digits} in words.", spelling, key)
    return exercise(rng, f"Write {spelling} in digits.", digits, key)


def word_problem(rng: Random) -> Document:
    """Somebody gets or gives away a few things; the sum is in the key, so it is split like any."""
    name, food = rng.choice(words.FIRST_NAMES), rng.choice(words.FOODS)
    has, moved = rng.randint(1, 60), rng.randint(1, 39)
    if rng.random() < 0.5 or moved > has:
        told, left, key = f"{name} gets {moved} more", has + moved, f"{has}+{moved}"
    else:
        told, left, key = f"{name} gives away {moved}", has - moved, f"{has}-{moved}"
    opening = f"{name} has {has} baskets of {food}. {told}."
    if rng.random() < 0.4:
        return story(f"{opening} Now {name} has {left} baskets of {food}.", key)
    return exercise(rng, f"{opening} How many baskets does {name} have now?", str(left), key)


def _exercise(
    rng: Random, questions: tuple[str, ...], first: int, second: int, result: int, key: str
) -> Document:
    spoken = result < 100 and rng.random() < 0.2
    a, b = (words.spell(first), words.spell(second)) if spoken else (str(first), str(second))
    answer = words.spell(result) if spoken else str(result)
    if rng.random() < 0.2:
        verb = "plus" if "+" in key else "minus"
        return story(f"{a} {verb} {b} is {answer}.", key)
    return exercise(rng, rng.choice(questions).format(a=a, b=b), answer, key)
