"""Prepared rows -> what is asked: the prompt, the reference and the possible labels.

Prompts are the very tokens that stand before an answer in training, so nothing is rendered or
tokenised a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from peftcli.preparing.work import MASKED

MOST_SEEN = 50_000
MOST_ANSWERS = 1000


@dataclass(frozen=True)
class Item:
    """One row; `start` is where its last answer begins, 0 for plain text."""

    key: str
    """A hash of ids and labels, the same in every evaluation."""
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    start: int
    answer: tuple[int, ...]
    """The reference's tokens with the one that ends it."""
    whole: bool
    """Whether the answer's end lies within the row."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the answer."""
        return self.ids[: self.start]


@dataclass(frozen=True)
class Texts:
    """Token ids -> what people and metrics read."""

    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]

    def answer(self, ids: Sequence[int]) -> str:
        """The text before the first stop token, without a thinking block."""
        end = next((place for place, token in enumerate(ids) if token in self.stops), None)
        text: str = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        thought, closed, said = text.rpartition("</think>")
        return (said if closed and "<think>" in thought else text).strip()

    def question(self, item: Item) -> str:
        """The whole prompt as the model sees it."""
        return str(self.tokenizer.decode(list(item.prompt))).strip()


def items_of(rows: Dataset, stops: Sequence[int], max_length: int) -> list[Item]:
    """Every row with its last answer; equal rows get keys with a number."""
    seen: Counter[str] = Counter()
    items = []
    for ids, labels in _rows(rows):
        start, end = last_answer(labels)
        text_only = start <= 1 and end == len(ids)
        answer = () if text_only else tuple(ids[start:end])
        whole = bool(answer) and (answer[-1] in stops or len(ids) < max_length)
        key = _key(ids, labels)
        seen[key] += 1
        name = key if seen[key] == 1 else f"{key}-{seen[key]}"
        begin = 0 if text_only else start
        items.append(Item(name, tuple(ids), tuple(labels), begin, answer, whole))
    return items


def last_answer(labels: Sequence[int]) -> tuple[int, int]:
    """The last unbroken run of trained tokens, as positions."""
    trained = np.flatnonzero(np.asarray(labels) != MASKED)
    end = int(trained[-1]) + 1
    breaks = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[breaks[-1] + 1]) if len(breaks) else int(trained[0])
    return start, end


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, evenly spread, in their order."""
    if not limit or len(items) <= limit:
        return list(items)
    places = np.linspace(0, len(items) - 1, limit).round().astype(int)
    return [items[place] for place in places]


@dataclass(frozen=True)
class Answers:
    """The different answers of many rows."""

    counts: Counter[str]
    tokens: dict[str, tuple[int, ...]]
    """The most frequent tokens of each answer."""


def answers_in(rows: Sequence[Dataset], texts: Texts) -> Answers | None:
    """The answers of up to 50,000 rows; None where more than 1,000 differ."""
    found: Counter[tuple[int, ...]] = Counter()
    for dataset in rows:
        step = max(1, len(dataset) // MOST_SEEN)
        for ids, labels in _rows(dataset.select(range(0, len(dataset), step))):
            start, end = last_answer(labels)
            found[tuple(ids[start:end])] += 1
            if len(found) > MOST_ANSWERS:
                return None
    counts: Counter[str] = Counter()
    tokens: dict[str, tuple[int, ...]] = {}
    for answer, times in found.most_common():
        text = texts.answer(answer)
        counts[text] += times
        tokens.setdefault(text, answer)
    return Answers(counts, tokens)


def digest(items: Sequence[Item]) -> str:
    """A hash of all keys in order."""
    return blake2b(" ".join(item.key for item in items).encode(), digest_size=16).hexdigest()


def _rows(dataset: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    for batch in dataset.iter(batch_size=1000):
        yield from zip(batch["input_ids"], batch["labels"], strict=True)


def _key(ids: Sequence[int], labels: Sequence[int]) -> str:
    both = np.asarray([ids, labels], dtype=np.int32).tobytes()
    return blake2b(both, digest_size=8).hexdigest()
