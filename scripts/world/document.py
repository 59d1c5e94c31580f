"""A document of the world, and the split that keeps held-out content out of the training text."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Literal

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 1 / 8

PLAIN_FORMS = ("{prompt}\n{answer}", "Task: {prompt}\nAnswer: {answer}", "Q: {prompt}\nA: {answer}")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer the question.",
    "You help people in a small town.",
    "Be exact and brief.",
    "You work in a shop. Be polite.",
)


@dataclass(frozen=True)
class Turn:
    """What one side says; the role `text` stands for a plain document without sides."""

    role: Literal["text", "system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Document:
    """Turns to read, and the keys of what they tell: people by name, sums by their numbers."""

    keys: tuple[str, ...]
    turns: tuple[Turn, ...]

    @property
    def is_chat(self) -> bool:
        return self.turns[0].role != "text"


def story(text: str, *keys: str) -> Document:
    return Document(keys, (Turn("text", text),))


def chat(prompt: str, answer: str, *keys: str) -> Document:
    return Document(keys, (Turn("user", prompt), Turn("assistant", answer)))


def exercise(rng: Random, prompt: str, answer: str, *keys: str) -> Document:
    """A request and its answer, mostly as a chat, sometimes as plain text."""
    if rng.random() < 0.7:
        return chat(prompt, answer, *keys)
    return story(rng.choice(PLAIN_FORMS).format(prompt=prompt, answer=answer), *keys)


def split_of(keys: tuple[str, ...]) -> Split | None:
    """The side on which every key lies, or None when the keys lie on both."""
    sides = {_is_heldout(key) for key in keys}
    if len(sides) != 1:
        return None
    return "heldout" if sides.pop() else "train"


def _is_heldout(key: str) -> bool:
    digest = blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**32
