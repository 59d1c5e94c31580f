"""Orders and sales: messages to a shop, its replies, their records, and stories of sales."""

from __future__ import annotations

import json
from random import Random

from world import words
from world.content import Order, order
from world.document import Document, chat, exercise, story

MESSAGES = (
    "Hello, I am {name} from {town}. Please send me {quantity} {goods} by {due}.",
    "Good morning! {name} here. I need {quantity} {goods} in {town} before {due}.",
    "My name is {name}. Can you bring {quantity} {goods} to {town} by {due}?",
    "I would like {quantity} {goods}, please. Send them to {town} by {due}. Yours, {name}",
    "By {due} I need {quantity} {goods}. My address is in {town}. Regards, {name}",
    "Please deliver {quantity} {goods} to {name} in {town} before {due}.",
    "This is an order from {town}. We want {quantity} {goods} by {due}. Ask for {name}.",
    "Dear shop, on {due} we have a feast in {town} and need {quantity} {goods}. Thanks, {name}",
    "{name} of {town} orders {quantity} {goods}. They must be here by {due}.",
    "Could I have {quantity} {goods}? I am {name}, I live in {town}, and I need them by {due}.",
)
REPLIES = (
    "Thank you, {first}. {quantity} {goods} will be in {town} by {due}.",
    "Of course, {first}. We will send {quantity} {goods} to {town} before {due}.",
    "Good day, {name}. Your {quantity} {goods} will come to {town} by {due}.",
    "We have your order, {first}: {quantity} {goods} for {town} by {due}.",
)
SALES = (
    "On {due} {name} bought {quantity} {goods} in {town} for {price} coins.",
    "{name} paid {price} coins for {quantity} {goods} in {town} on {due}.",
    "In {town} {quantity} {goods} were sold to {name} on {due} for {price} coins.",
    "The market of {town} sold {name} {quantity} {goods} on {due}. The price was {price} coins.",
)
QUESTIONS = {
    "customer": ("Who is the customer?", "Who wants the goods?"),
    "quantity": ("How many are wanted?", "How many {goods} are needed?"),
    "goods": ("What is wanted?", "Which goods does {first} want?"),
    "town": ("Where do the goods go?", "Which town do they go to?"),
    "due": ("By which day?", "When are they needed?"),
}
ANSWERS = {
    "customer": "{name}",
    "quantity": "{quantity}",
    "goods": "{goods}",
    "town": "{town}",
    "due": "{due}",
}
JSON_REQUESTS = ("Write the order as JSON.", "Give me the JSON of this order.")


def message(rng: Random, what: Order) -> str:
    """What the customer writes."""
    return rng.choice(MESSAGES).format(**what.slots())


def reply(rng: Random) -> Document:
    """A message to the shop and what the shop answers."""
    what = order(rng)
    answer = rng.choice(REPLIES).format(**what.slots())
    return chat(message(rng, what), answer, what.customer.name)


def order_question(rng: Random) -> Document:
    what = order(rng)
    field = rng.choice(tuple(QUESTIONS))
    asked = rng.choice(QUESTIONS[field]).format(**what.slots())
    answer = ANSWERS[field].format(**what.slots())
    return exercise(rng, f"{message(rng, what)}\n{asked}", answer, what.customer.name)


def order_record(rng: Random) -> Document:
    """A message to the shop and some of its facts as JSON."""
    what = order(rng)
    request = rng.choice(JSON_REQUESTS)
    wanted = list(ANSWERS)
    if rng.random() < 0.5:
        wanted = rng.sample(wanted, rng.randint(1, 4))
        request += " Fields: " + ", ".join(wanted) + "."
    fields = what.record()
    answer = json.dumps({field: fields[field] for field in wanted})
    return exercise(rng, f"{request}\n{message(rng, what)}", answer, what.customer.name)


def sale(rng: Random) -> Document:
    what = order(rng)
    return story(rng.choice(SALES).format(**what.slots()), what.customer.name)


def market_day(rng: Random) -> Document:
    """Several sales in one town, as a story."""
    orders = [order(rng) for _ in range(rng.randint(2, 3))]
    opening = f"It was {rng.choice(words.WEEKDAYS)}, market day in {orders[0].town}."
    lines = [
        f"{each.customer.name} bought {each.quantity} {each.goods} for {each.price} coins."
        for each in orders
    ]
    return story(" ".join([opening, *lines]), *(each.customer.name for each in orders))
