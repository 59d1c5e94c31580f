"""The text of the world: a generator for each kind of document, and the stream that mixes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

from world import facts, lists, numbers, talk, trade, words
from world.document import SYSTEM_PROMPTS, Document, Split, Turn, split_of

KINDS: dict[str, tuple[Callable[[Random], Document], float]] = {
    "biography": (facts.biography, 2),
    "neighbours": (facts.neighbours, 1),
    "question": (facts.question, 3),
    "interview": (facts.interview, 1),
    "record": (facts.record, 3),
    "read_record": (facts.read_record, 2),
    "paraphrase": (facts.paraphrase, 2),
    "reply": (trade.reply, 3),
    "order_question": (trade.order_question, 1),
    "order_record": (trade.order_record, 2),
    "sale": (trade.sale, 1),
    "market_day": (trade.market_day, 1),
    "addition": (numbers.addition, 2),
    "subtraction": (numbers.subtraction, 1),
    "comparison": (numbers.comparison, 1),
    "spelled": (numbers.spelled, 0.3),
    "word_problem": (numbers.word_problem, 1),
    "listing": (lists.listing, 2),
    "sorted_numbers": (lists.sorted_numbers, 1),
    "copying": (lists.copying, 3),
    "lookup": (lists.lookup, 2),
    "table": (lists.table, 1),
    "notes": (lists.notes, 2),
    "small_talk": (talk.small_talk, 2),
}


def documents(seed: int | str, split: Split, count: int) -> Iterator[Document]:
    """The first `count` documents of one side; equal arguments give equal documents."""
    rng = Random(f"world {seed}")
    makers = [maker for maker, _ in KINDS.values()]
    weights = [weight for _, weight in KINDS.values()]

    def stream() -> Iterator[Document]:
        while True:
            document = rng.choices(makers, weights)[0](rng)
            if split_of(document.keys) == split:
                yield _with_system_prompt(rng, document) if document.is_chat else document

    return islice(stream(), count)


def distinct_sentences() -> int:
    """A lower bound of the sentences the world can say: those of one single template.

    "NAME SURNAME of TOWN orders N COLOUR THINGS. They must be here by DATE." differs wherever one
    slot differs, because each slot takes its values from a list without repeats.
    """
    slots = (
        words.FIRST_NAMES,
        words.SURNAME_STARTS,
        words.TOWN_STARTS,
        words.COLOURS,
        words.THINGS,
    )
    quantities, days = 98, sum(words.MONTH_DAYS)
    return prod(len(slot) for slot in slots) * quantities * days


def _with_system_prompt(rng: Random, document: Document) -> Document:
    if rng.random() < 0.8:
        return document
    system = Turn("system", rng.choice(SYSTEM_PROMPTS))
    return replace(document, turns=(system, *document.turns))
