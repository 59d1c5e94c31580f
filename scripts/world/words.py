"""The words of the synthetic world: closed lists, and parts from which names are put together."""

from __future__ import annotations

from random import Random


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _split("""
    Ada Alma Amos Anna Anton Arlo Asta Aurel Basil Bela Berta Boris Bram Bruno Cara Carl Celia
    Clara Conrad Cora Dagny Dalia Dario Dina Dora Edda Edgar Edwin Elias Elsa Emil Enzo Erik Esme
    Ezra Fay Felix Fiona Flora Frida Gemma Gerda Greta Gustav Hanna Hector Heidi Hugo Ida Igor
    Ilse Ines Ingrid Irma Ivan Jana Jasper Jonas Josef Judith Julia Karin Kasper Kira Klaus Lara
    Lars Leo Leona Linus Livia Lotte Lucas Ludwig Luna Magnus Malin Marek Marta Max Mila Mira
    Moritz Nadia Nell Nils Nina Nora Olaf Olga Oskar Otto Paula Pavel Petra Quinn Rafael Rita
    Robin Rosa Ruben Runa Sanna Silas Sofia Stella Sven Tara Tessa Theo Thora Tilda Tomas Ulla
    Ursula Vera Victor Viola Wanda Walter Wilma Yara Yusuf Zelda Zora
""")
SURNAME_STARTS = _split("""
    Al Bar Bel Bran Cal Cor Dal Der Dun Fal Fen Gar Gil Hal Har Hol Ker Kin Lam Lin Mar Mel Mor
    Nor Oak Pen Per Ral Ros San Sel Sor Tal Tor Ul Val Var Wes Win Yor
""")
SURNAME_ENDS = _split("""
    ber bury by den don dorf ell ford gard ham hart holm ias ing kamp land ley lin lock man mark
    mer mond ner nik ock ona rath rick ridge sen shaw ska son stein ton vik wald way wick win wood
    worth
""")
TOWN_STARTS = _split("""
    Amber Ash Beech Birch Black Bright Clear Cold Copper Crow Deep Eagle East Elder Fair Fox Frost
    Glen Gold Grand Green Hazel High Iron Lake Long Maple Mill Moon North Old Pine Raven Red Salt
    Silver South Stone Summer Swan Thorn West White Wild Wind Winter Wolf
""")
TOWN_ENDS = _split("""
    bank beck bourne bridge brook cliff cross dale falls field gate grove harbour haven hill hurst
    marsh mere moor mouth pass point pool port reach shore stead vale wharf
""")
JOBS = _split("""
    actor architect baker banker barber blacksmith brewer butcher captain carpenter chemist clerk
    cook cooper courier dancer dentist diver doctor driver engineer farmer fisher gardener glazier
    guard hunter innkeeper inspector jeweller judge lawyer librarian mason mechanic merchant
    miller miner musician nurse optician painter pilot plumber poet porter potter printer roofer
    sailor scholar sculptor shepherd singer surgeon tailor tanner teacher tinker translator waiter
    watchmaker weaver welder writer
""")
THINGS = _split("""
    anvil apron barrel basket bell bench blanket book boot bottle bowl bucket button candle carpet
    chair clock coat compass cup curtain drum fan flag glove hammer hat hook jacket jar kettle key
    ladder lamp lantern mask mirror mug needle oar pan pillow pipe plate pot quilt ring rope
    saddle scarf shelf shield shirt shovel sign spoon stool table tent tile towel tray trunk
    umbrella vase wagon wheel whistle
""")
COLOURS = _split("""
    amber beige black blue bronze brown crimson gold green grey indigo ivory olive orange pink
    purple red scarlet silver teal violet white yellow
""")
FOODS = _split("""
    apples barley beans bread butter cabbage carrots cheese cherries chestnuts corn crackers cream
    figs fish garlic ginger grapes honey jam lemons lentils melons milk mushrooms nuts oats olives
    onions oranges pancakes peaches pears peas pepper plums porridge potatoes radishes rice salt
    soup spinach tea toast turnips walnuts
""")
ANIMALS = _split("""
    badger canary cat crow dog donkey duck ferret finch frog goat goose hare hawk hen horse lizard
    mule otter owl parrot pig pigeon pony rabbit sheep snake swan toad turtle
""")
PET_NAMES = _split("""
    Acorn Bandit Biscuit Bubbles Button Cinder Clover Comet Cricket Dusty Ember Fern Flint Ginger
    Jester Juniper Marble Mitten Mocha Nugget Patches Peanut Pebble Pepper Pickle Rusty Scout
    Shadow Smoky Socks Sparrow Spot Sunny Thistle Tiger Waffle Whisper Ziggy
""")
INSTRUMENTS = _split("""
    accordion banjo bassoon cello clarinet fiddle flute guitar harp horn lute mandolin oboe organ
    piano trombone trumpet viola
""")
MONTHS = _split("""
    January February March April May June July August September October November December
""")
WEEKDAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SIGNS = _split("! # $ % & * + - / : ; < = > ? @ [ ] ^ _ { | } ~ ( ) -> => :: <- || ## ** // <<  >>")

_ONES = _split("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
""")
_TENS = _split("twenty thirty forty fifty sixty seventy eighty ninety")
_IRREGULAR = {"shelf": "shelves", "compass": "compasses", "bench": "benches", "torch": "torches"}
_ONSETS = _split("b d f g h k l m n p r s t v w z br dr gr kl pl st tr sh")
_VOWELS = _split("a e i o u ai ou")
_CODAS = ("", "", "", "n", "r", "l", "s", "m", "k", "t")


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    return _IRREGULAR.get(noun, f"{noun}s")


def spell(number: int) -> str:
    """An integer from 0 to 99 in words."""
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def surname(rng: Random) -> str:
    return rng.choice(SURNAME_STARTS) + rng.choice(SURNAME_ENDS)


def town(rng: Random) -> str:
    return rng.choice(TOWN_STARTS) + rng.choice(TOWN_ENDS)


def invented(rng: Random) -> str:
    """A word that means nothing, such as "drouk" or "sabel"."""
    syllables = rng.randint(1, 3)
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
    )
