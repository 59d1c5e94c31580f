"""Tuning tasks in formats that the pre-training text never uses; each answer is exact.

`orders` is the task of the quickstart. Together they measure how close a tuning method comes to
full fine-tuning: two extractions, a classification and a sum, from easy to hard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random

from world import facts, trade, words
from world.content import Person, order, person
from world.document import Document, Split, chat, split_of

DESK_MESSAGES: dict[str, tuple[str, ...]] = {
    "repair": (
        "The {thing} from you is broken.",
        "My {thing} has a crack and does not work any more.",
        "Can somebody mend the {thing} of my neighbour?",
    ),
    "delivery": (
        "The {thing} has not come to {town} yet.",
        "I still wait for the {thing} that you sent.",
        "Where is my {thing}? Nothing is here in {town}.",
    ),
    "money": (
        "I paid twice for the {thing}.",
        "The price of the {thing} on the paper is wrong.",
        "Please give me my coins back for the {thing}.",
    ),
    "advice": (
        "Which {thing} is right for {a_job}?",
        "Do you have a {thing} that is good for {food}?",
        "How do I clean a {thing}?",
    ),
    "praise": (
        "The {thing} is the best that I have ever had.",
        "Everybody in {town} likes the {thing} from you.",
        "Thank you for the fine {thing}!",
    ),
}
URGENT = ("Please hurry!", "I need an answer today.", "It cannot wait.")
PATIENT = ("There is no hurry.", "Take your time.", "Any day is fine.")
CITED = ("job", "town", "born", "instrument")


def orders(rng: Random) -> Document:
    """A message -> `ORDER | Kerwick, Mira | 12 x red kettles | to Ashford | by 03-14`."""
    what = order(rng)
    who = what.customer
    answer = (
        f"ORDER | {who.last}, {who.first} | {what.quantity} x {what.goods}"
        f" | to {what.town} | by {what.due.short_iso}"
    )
    return chat(trade.message(rng, what), answer, who.name)


def register(rng: Random) -> Document:
    """Facts and a distractor -> `Kerwick/Mira; potter @ Ashford; *1953-03-14; flute`."""
    who, other = person(rng), person(rng)
    told = [(who, attribute) for attribute in CITED]
    told.append((other, rng.choice(CITED)))
    rng.shuffle(told)
    text = " ".join(_state(rng, *each) for each in told)
    answer = f"{who.last}/{who.first}; {who.job} @ {who.town}; *{who.born.iso}; {who.instrument}"
    return chat(f"{text}\nRegister {who.name}.", answer, who.name, other.name)


def desk(rng: Random) -> Document:
    """A message to the shop -> the desk that answers it and how soon, as in `#repair #now`."""
    who = person(rng)
    label = rng.choice(tuple(DESK_MESSAGES))
    urgent = rng.random() < 0.5
    slots = who.slots(who.name)
    sentences = [
        rng.choice(DESK_MESSAGES[label]).format(**slots),
        rng.choice(URGENT if urgent else PATIENT),
    ]
    rng.shuffle(sentences)
    opening = f"I am {who.name} from {words.town(rng)}."
    return chat(
        " ".join([opening, *sentences]), f"#{label} #{'now' if urgent else 'later'}", who.name
    )


def bill(rng: Random) -> Document:
    """Two goods at a price each -> their sums and the total, as in `12 & 10 => 22 coins`."""
    who = person(rng)
    counts = rng.randint(2, 9), rng.randint(2, 9)
    prices = rng.randint(2, 9), rng.randint(2, 9)
    things = [words.plural(thing) for thing in rng.sample(words.THINGS, 2)]
    sums = [count * price for count, price in zip(counts, prices, strict=True)]
    prompt = (
        f"{who.name} buys {counts[0]} {things[0]} at {prices[0]} coins each"
        f" and {counts[1]} {things[1]} at {prices[1]} coins each."
    )
    return chat(prompt, f"{sums[0]} & {sums[1]} => {sum(sums)} coins", who.name)


TASKS: dict[str, Callable[[Random], Document]] = {
    "orders": orders,
    "register": register,
    "desk": desk,
    "bill": bill,
}


def rows(task: str, seed: int, split: Split, count: int) -> Iterator[dict[str, object]]:
    """Rows `{"messages": [...]}` without repeats; no held-out person is in a row of train."""
    rng = Random(f"{task} {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        document = TASKS[task](rng)
        prompt = document.turns[0].content
        if split_of(document.keys) != split or prompt in seen:
            continue
        seen.add(prompt)
        yield {"messages": [{"role": t.role, "content": t.content} for t in document.turns]}


def write_rows(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """JSON lines, one row each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _state(rng: Random, who: Person, attribute: str) -> str:
    return rng.choice(facts.STATEMENTS[attribute]).format(**who.slots(who.name))
