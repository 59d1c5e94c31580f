"""How much one rendering may make: the size of values, counted before they are made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2.utils import Namespace  # noqa: TID253 - this file is heavy

MAX_STEPS = 1_000_000
MAX_VALUE = 16 << 20  # characters of one value; a row of training data has 4 million at most
MAX_MADE = 64 << 20  # characters of all values that one rendering makes
MAX_COMPARED = 10**9  # searching backwards takes the product of both lengths
MAX_BITS = 10_000
NODE = 32  # what a part of a list or map counts for
WIDE = re.compile(r"\d{5}|\*|\{[^{}]*[:!][^{}]*\{")


class TooMuch(Exception):
    """A template ran too long or makes too much."""


class Budget:
    """What one rendering has made so far."""

    def __init__(self) -> None:
        self.made = 0
        self.steps = 0

    def spend(self, size: int) -> None:
        """Count a value of this size; raises TooMuch when it is too large, or the last straw."""
        self.made += size
        if size > MAX_VALUE or self.made > MAX_MADE:
            raise TooMuch("it makes too much text")

    def step(self, count: int) -> None:
        """Count steps of a loop."""
        self.steps += count
        if self.steps > MAX_STEPS:
            raise TooMuch(f"more than {MAX_STEPS} loop steps")

    def kept(self, value: Any) -> Any:
        """The value, counted; lists by their length, as their parts are counted elsewhere."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(16 * len(value))
        return value

    def text(self, value: Any) -> str:
        """The value as text."""
        if isinstance(value, str):
            return value
        self.spend(weight(value))
        return str(value)

    def joined(self, values: Iterable[Any], separator: str = "") -> str:
        """All values as one text."""
        texts = [value if isinstance(value, str) else self.text(value) for value in values]
        self.spend(sum(map(len, texts)) + len(separator) * len(texts))
        return separator.join(texts)

    def called(self, text: str, method: str, values: list[Any]) -> None:
        """Count what a method of a text is about to make of it."""
        for value in values:
            if isinstance(value, str) and len(value) * len(text) > MAX_COMPARED:
                raise TooMuch("it searches too long a text")
        if method == "replace" and len(values) > 1:
            self.spend(len(text) + text.count(str(values[0])) * len(str(values[1])))
        elif method == "expandtabs":
            width = values[0] if values and isinstance(values[0], int) else 8
            self.spend(len(text) + text.count("\t") * width)
        elif method == "translate":
            self.spend(len(text) * max(1, weight(values)))

    def formatted(self, form: str, values: Iterable[Any]) -> None:
        """Count what a format makes: each of its fields may show every value."""
        if WIDE.search(form):
            raise TooMuch("it pads text")
        fields = form.count("%") + form.count("{")
        self.spend(len(form) + fields * sum(map(weight, values)))


def weight(value: Any) -> int:
    """About the characters that a value takes as text; MAX_VALUE + 1 when it is more than that."""
    total, waiting = 0, [value]
    while waiting and total <= MAX_VALUE:
        item = waiting.pop()
        total += NODE
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, bool):
            continue
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, Namespace):
            waiting.append(object.__getattribute__(item, "_Namespace__attrs"))
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
    return min(total, MAX_VALUE + 1)


def check_operation(operator: str, left: Any, right: Any) -> int:
    """The size of what a binary operator makes; raises TooMuch for endless numbers and texts."""
    pair = (left, right)
    sizes = [len(side) for side in pair if isinstance(side, str | list | tuple)]
    numbers = [side for side in pair if isinstance(side, int)]
    if operator == "*" and sizes and numbers:
        if max(sizes) * max(numbers) > MAX_STEPS:
            raise TooMuch("it repeats text too often")
        return max(sizes) * max(0, *numbers)
    if operator == "+" and len(sizes) == 2:
        return sum(sizes) if isinstance(left, str) else 16 * sum(sizes)
    if operator == "**" and any(isinstance(s, int | float) and abs(s) > 1000 for s in pair):
        raise TooMuch("it raises to a power")
    if sum(number.bit_length() for number in numbers) > MAX_BITS:
        raise TooMuch("it makes endless numbers")
    return 0
