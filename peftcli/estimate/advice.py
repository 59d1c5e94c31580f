"""Changes of a recipe that make it need less memory, and what each saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peftcli.estimate.fit import longest_row, modes, smallest, verdict
from peftcli.estimate.gpus import GIB, Gpu
from peftcli.estimate.memory import host_bytes, training_peak
from peftcli.estimate.plan import Plan
from peftcli.methods import changed
from peftcli.recipe.checks import method_problems
from peftcli.recipe.schema import Recipe

Plans = Callable[[Recipe], list[Plan]]
"""Every way to run a recipe: the micro-batches and modes that it leaves open."""
WORTH = 0.01  # of the peak; what saves less is not advice

SLOWER = "30 to 45 % slower"


@dataclass(frozen=True, eq=False)
class Card:
    """A GPU of which others hold `reserved` bytes, in a machine with `host` bytes to spare."""

    gpu: Gpu
    reserved: float
    host: float = math.inf

    def holds(self, plans: list[Plan]) -> bool:
        """Whether any of them fits."""
        stored = [plan for plan in plans if self.stores(plan)]
        return any(verdict(plan, self.gpu, self.reserved) == "fits" for plan in stored)

    def stores(self, plan: Plan) -> bool:
        """Whether the machine has the host memory that the plan takes."""
        return host_bytes(plan) <= self.host


@dataclass(frozen=True, eq=False)
class Change:
    """One change of a recipe, what it saves of the peak, and whether it is enough on its own."""

    section: str
    keys: dict[str, Any]
    consequence: str
    recipe: Recipe
    saves: float
    fits: bool

    @property
    def line(self) -> str:
        """`section.key: value`, as messages name it."""
        return ", ".join(f"{self.section}.{key}: {_yaml(x)}" for key, x in self.keys.items())


@dataclass(frozen=True, eq=False)
class Advice:
    """The cheapest changes one by one, and the fewest of all that make the run fit."""

    single: tuple[Change, ...]
    together: tuple[Change, ...]
    """Empty where nothing helps."""


def advise(recipe: Recipe, plans: Plans, card: Card, most: int = 3) -> Advice:
    """What to change in a recipe that does not fit, the cheapest for its user first.

    With `most` 0 only whether changes together make it fit, which takes less time.
    """
    if not most:
        return Advice((), _together(recipe, plans, card))
    found = [change for change in _changes(recipe, plans, card) if change.saves > 0]
    peak = _peak(plans(recipe))
    worth = [change for change in found if change.fits or change.saves > WORTH * peak]
    worth.sort(key=lambda change: not change.fits)  # stable: the cheap ones stay first
    return Advice(tuple(worth[:most]), _together(recipe, plans, card))


def as_yaml(changes: Iterable[Change]) -> str:
    """The changes as lines to paste over those of a recipe."""
    sections: dict[str, dict[str, Any]] = {}
    for change in changes:
        sections.setdefault(change.section, {}).update(change.keys)
    lines = []
    for section, keys in sections.items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {_yaml(value)}" for key, value in keys.items()]
    return "\n".join(lines)


def _together(recipe: Recipe, plans: Plans, card: Card) -> tuple[Change, ...]:
    """One change after the other until the run fits, then without those that it fits without."""
    taken: list[Change] = []
    now = recipe
    while not card.holds(plans(now)):
        following = next((x for x in _changes(now, plans, card) if x.fits or x.saves > 0), None)
        if following is None:
            return ()
        taken.append(following)
        now = following.recipe
    for change in list(taken):
        others = [x for x in taken if x is not change]
        if "name" in change.keys and any(x.section == change.section for x in others):
            continue  # the other's keys are those of the new method
        if len(taken) > 1 and card.holds(plans(_applied(recipe, others))):
            taken = others
    return tuple(taken)


def _applied(recipe: Recipe, changes: Iterable[Change]) -> Recipe:
    for change in changes:
        recipe = _with(recipe, change.section, change.keys)
    return recipe


def _changes(recipe: Recipe, plans: Plans, card: Card) -> Iterator[Change]:
    """Everything that can be changed, in the order of what it costs the user."""
    now = plans(recipe)
    before = _peak(now)
    for section, keys, consequence in _offers(recipe, now, card):
        other = _with(recipe, section, keys)
        if section == "method" and method_problems(other.method, now[0].architecture):
            continue
        after = plans(other)
        saves = before - _peak(after)
        yield Change(section, keys, consequence, other, saves, card.holds(after))


Offer = tuple[str, dict[str, Any], str]


def _offers(recipe: Recipe, plans: list[Plan], card: Card) -> Iterator[Offer]:
    training, thrift = recipe.training, recipe.method.thriftier()
    if training.micro_batch_size not in ("auto", 1):
        text = "the same result, fewer rows at a time"
        yield "training", {"micro_batch_size": 1}, text
    mode = training.checkpointing
    if mode == "none" or isinstance(mode, int):
        yield "training", {"checkpointing": "full"}, f"the same result{_slower(plans[0])}"
    offers = mode not in ("auto", "offload") and "offload" in modes(plans[0])
    if offers and card.stores(smallest(plans).checkpointed("offload")):
        yield "training", {"checkpointing": "offload"}, _cost_of_offload(plans)
    if "8bit" not in recipe.optimizer:
        yield "training", {"optimizer": "paged_adamw_8bit"}, "optimizer states in 8 bits"
    for change in thrift:
        yield "method", change.keys, change.consequence
    plan = smallest(plans)
    length = longest_row(plan, card.gpu, card.reserved) or plan.length // 2
    if 64 <= length < plan.length:
        yield "data", {"max_length": length}, "longer rows are cut or dropped"


def _cost_of_offload(plans: list[Plan]) -> str:
    size = host_bytes(smallest(plans).checkpointed("offload")) / GIB
    slower = _slower(plans[0])
    return f"the same result{slower}, and {size:.1f} GiB of host memory for the layers' inputs"


def _slower(plan: Plan) -> str:
    """What it costs to compute every layer again, where none or only some are."""
    if not plan.checkpointing:
        return f", {SLOWER}"
    more = plan.architecture.layers - plan.again
    return f", {more} more layers computed again" if more else ""


def _with(recipe: Recipe, section: str, keys: dict[str, Any]) -> Recipe:
    if section == "method":
        return recipe.model_copy(update={"method": changed(recipe.method, keys)})
    inner = getattr(recipe, section).model_copy(update=keys)
    return recipe.model_copy(update={section: inner})


def _peak(plans: list[Plan]) -> float:
    return training_peak(smallest(plans)).size


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
