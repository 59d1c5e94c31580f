"""What the world consists of: people and orders, as plain values drawn from a random source."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from world import words


@dataclass(frozen=True)
class Date:
    month: int
    day: int
    year: int

    @property
    def spoken(self) -> str:
        return f"{self.day} {words.MONTHS[self.month - 1]}"

    @property
    def long(self) -> str:
        return f"{self.spoken} {self.year}"

    @property
    def short_iso(self) -> str:
        return f"{self.month:02d}-{self.day:02d}"

    @property
    def iso(self) -> str:
        return f"{self.year}-{self.short_iso}"


@dataclass(frozen=True)
class Person:
    """Somebody; the full name is the identity by which documents are split."""

    first: str
    last: str
    job: str
    town: str
    house: int
    born: Date
    colour: str
    thing: str
    animal: str
    pet: str
    food: str
    instrument: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"

    def slots(self, called: str) -> dict[str, str]:
        """The values that a sentence template may use, with `called` as the name."""
        return {
            "name": called,
            "job": self.job,
            "a_job": words.a(self.job),
            "town": self.town,
            "house": str(self.house),
            "born": self.born.long,
            "a_thing": f"{words.a(self.colour)} {self.thing}",
            "thing": f"{self.colour} {self.thing}",
            "a_pet": words.a(self.animal),
            "animal": self.animal,
            "pet": self.pet,
            "food": self.food,
            "instrument": self.instrument,
        }

    def record(self) -> dict[str, str | int]:
        """The same facts as the fields of a JSON record."""
        return {
            "name": self.name,
            "job": self.job,
            "town": self.town,
            "house": self.house,
            "born": self.born.iso,
            "owns": f"{self.colour} {self.thing}",
            "pet": f"{self.pet} ({self.animal})",
            "food": self.food,
            "instrument": self.instrument,
        }


@dataclass(frozen=True)
class Order:
    """A customer asks a shop for goods, by a day, to a town."""

    customer: Person
    quantity: int
    colour: str
    thing: str
    town: str
    due: Date
    price: int

    @property
    def goods(self) -> str:
        """The goods without their number; one of a thing is still named in the plural form."""
        return f"{self.colour} {words.plural(self.thing)}"

    def slots(self) -> dict[str, str]:
        return {
            "name": self.customer.name,
            "first": self.customer.first,
            "last": self.customer.last,
            "quantity": str(self.quantity),
            "goods": self.goods,
            "town": self.town,
            "due": self.due.spoken,
            "price": str(self.price),
        }

    def record(self) -> dict[str, str | int]:
        return {
            "customer": self.customer.name,
            "quantity": self.quantity,
            "goods": self.goods,
            "town": self.town,
            "due": self.due.short_iso,
            "price": self.price,
        }


def date(rng: Random) -> Date:
    month = rng.randint(1, 12)
    return Date(month, rng.randint(1, words.MONTH_DAYS[month - 1]), rng.randint(1900, 2029))


def person(rng: Random) -> Person:
    return Person(
        first=rng.choice(words.FIRST_NAMES),
        last=words.surname(rng),
        job=rng.choice(words.JOBS),
        town=words.town(rng),
        house=rng.randint(1, 999),
        born=date(rng),
        colour=rng.choice(words.COLOURS),
        thing=rng.choice(words.THINGS),
        animal=rng.choice(words.ANIMALS),
        pet=rng.choice(words.PET_NAMES),
        food=rng.choice(words.FOODS),
        instrument=rng.choice(words.INSTRUMENTS),
    )


def order(rng: Random) -> Order:
    return Order(
        customer=person(rng),
        quantity=rng.randint(2, 99),
        colour=rng.choice(words.COLOURS),
        thing=rng.choice(words.THINGS),
        town=words.town(rng),
        due=date(rng),
        price=rng.randint(2, 99),
    )
