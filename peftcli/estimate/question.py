"""What an estimate is about, and the ways to run a recipe that it leaves open."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from peftcli.architecture.config import Architecture
from peftcli.estimate.duration import Lengths
from peftcli.estimate.facts import plan_of
from peftcli.estimate.fit import candidates
from peftcli.estimate.gpus import Gpu
from peftcli.estimate.memory import host_bytes
from peftcli.estimate.plan import Mode, Plan
from peftcli.estimate.result import Rows
from peftcli.recipe.checks import one_at_a_time, packs
from peftcli.recipe.schema import Recipe


@dataclass(frozen=True, eq=False)
class Question:
    """What an estimate is about, beside the recipe."""

    architecture: Architecture
    gpu: Gpu
    rows: Rows
    reserved: float
    """Bytes of the card that others hold."""
    host: float = math.inf
    """Bytes of host memory that layers' inputs may take; of another machine nobody knows."""

    def plans(self, recipe: Recipe) -> list[Plan]:
        """Every way to run a recipe that it leaves open and the host has the memory for.

        Where it has too little for any, the one that takes least.
        """
        found = self.all_plans(recipe)
        held = [plan for plan in found if host_bytes(plan) <= self.host]
        return held or [min(found, key=host_bytes)]

    def all_plans(self, recipe: Recipe) -> list[Plan]:
        """Every way to run a recipe that it leaves open, whatever the host has."""
        packing = packs(recipe, self.architecture)
        length = row_length(recipe, self.architecture, self.rows, packing)
        base = plan_of(recipe, self.architecture, self.gpu, length=length, packing=packing)
        alone = one_at_a_time(recipe, self.architecture)
        return candidates(base, 1 if alone else fixed_micro_batch(recipe), fixed_mode(recipe))

    def lengths(self, recipe: Recipe, plan: Plan) -> Lengths:
        """The lengths of rows that speed is judged by."""
        mean = min(self.rows.mean or plan.length, plan.length)
        found = Lengths(mean, plan.length)
        if packs(recipe, self.architecture):
            return Lengths(plan.length, plan.length, packed=mean)
        return replace(found, rows=self.rows.count) if self.rows.count else found

    def steps(self, recipe: Recipe, plan: Plan) -> int | None:
        """Optimizer steps of the whole run; None where the rows are not known."""
        if recipe.training.max_steps is not None:
            return recipe.training.max_steps
        if self.rows.count is None:
            return None
        sequences = self.rows.count
        if packs(recipe, plan.architecture) and self.rows.mean:
            sequences = math.ceil(self.rows.count * self.rows.mean / plan.length)
        each = math.ceil(sequences / recipe.training.batch_size)
        return max(1, math.ceil(recipe.training.epochs * each))


def row_length(recipe: Recipe, architecture: Architecture, rows: Rows, packing: bool) -> int:
    """Tokens of the longest row as it is computed."""
    length = recipe.data.max_length
    if rows.longest is not None and not packing:
        length = min(length, rows.longest)
    return min(length, architecture.max_positions or length)


def fixed_micro_batch(recipe: Recipe) -> int | None:
    """Rows at a time, where the recipe says it."""
    size = recipe.training.micro_batch_size
    return None if size == "auto" else size


def fixed_mode(recipe: Recipe) -> Mode | None:
    """The mode of checkpointing, where the recipe says it."""
    mode = recipe.training.checkpointing
    return None if mode == "auto" else mode
