"""Estimate a recipe: memory by part, time, cost, what to change, and which GPUs would do."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from peftcli.architecture.config import Architecture
from peftcli.estimate.advice import Advice, Card, advise, as_yaml
from peftcli.estimate.duration import Lengths, duration
from peftcli.estimate.facts import plan_of
from peftcli.estimate.find import find_architecture
from peftcli.estimate.fit import (
    candidates,
    choose,
    gpus_that_fit,
    largest_micro_batch,
    longest_row,
    modes,
    need,
    smallest,
    verdict,
)
from peftcli.estimate.gpus import GIB, Gpu
from peftcli.estimate.groups import copies_of_factors
from peftcli.estimate.memory import host_bytes, loading_parts, loading_peak, training_peak
from peftcli.estimate.merging import merge_estimate
from peftcli.estimate.notes import notes_on, refusal
from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Mode, Plan
from peftcli.estimate.result import (
    Estimate,
    Limits,
    MemoryEstimate,
    MemoryPart,
    MergeEstimate,
    OtherGpu,
    Rows,
    Settings,
    Suggestion,
    TimeEstimate,
)
from peftcli.estimate.weights import weights
from peftcli.recipe.checks import packs
from peftcli.recipe.schema import Recipe

NOTHING = Advice((), ())


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
        return candidates(base, _fixed_micro_batch(recipe), _fixed_mode(recipe))

    def lengths(self, recipe: Recipe, plan: Plan) -> Lengths:
        """The lengths of rows that speed is judged by."""
        mean = min(self.rows.mean or plan.length, plan.length)
        found = Lengths(mean, plan.length)
        if packs(recipe, self.architecture):
            return Lengths(plan.length, plan.length, packed=mean)
        return replace(found, rows=self.rows.count) if self.rows.count else found


def run(
    recipe: Recipe,
    gpu: Gpu,
    *,
    rows: Rows | None = None,
    architecture: Architecture | None = None,
    reserved_gib: float = 0.0,
    host_gib: float = math.inf,
    price: float | None = None,
    always_advise: bool = False,
    never_advise: bool = False,
    brief: bool = False,
) -> Estimate:
    """Estimate a recipe on a GPU of which others take `reserved_gib`, at `price` USD an hour.

    With `host_gib`, inputs of layers wait in host memory only where they take no more than that.
    Changes are listed where it does not fit, and always with `always_advise`, or never. A `brief`
    estimate has neither single changes nor the most that fits.

    Without `architecture` the model is looked for on this machine and in the catalog. Raises
    UsageError for an unknown model and ArtefactError for a broken config.json.
    """
    found = architecture or find_architecture(recipe.model.name)
    question = Question(found, gpu, rows or Rows(), reserved_gib * GIB, host_gib * GIB)
    plans = question.plans(recipe)
    lengths = question.lengths(recipe, plans[0])
    plan = choose(plans, gpu, question.reserved, lengths) or smallest(plans)
    state = verdict(plan, gpu, question.reserved)
    advice, word = NOTHING, str(state)
    if always_advise or (state != "fits" and not never_advise):
        card = Card(gpu, question.reserved, question.host)
        advice = advise(recipe, question.plans, card, 0 if brief else 3)
    if state == "does not fit" and advice.together:
        word = "fits with changes"
    refused = refusal(recipe, found, gpu)
    word = "does not run" if refused else word
    others = [] if word == "fits" else gpus_that_fit(plan)
    others = [other for other in others if not refusal(recipe, found, other)]
    packing = packs(recipe, found)
    return Estimate(
        model=recipe.model.name,
        method=recipe.method.name,
        parameters=found.parameters(),
        trainable=plan.trainable,
        adapter_file_gib=4 * plan.trainable / GIB,  # float32, as they are trained
        gpu=gpu.name,
        verdict=word,
        memory=_memory(plan, gpu, question.reserved),
        settings=_settings(plan, packing=packing),
        limits=_limits(recipe, plan, question) if state == "fits" and not brief else None,
        merge=_merge(recipe, plan),
        time=_time(recipe, plan, question, lengths, price),
        changes=tuple(
            Suggestion(x.line, x.consequence, x.saves / GIB, x.fits) for x in advice.single
        ),
        paste=as_yaml(advice.together),
        other_gpus=tuple(map(_other, others[:3])),
        refusal=refused,
        own_price=price is not None,
        offload_needs_gib=0.0 if state == "fits" else _offload_needs(recipe, question),
        notes=tuple(notes_on(recipe, plan, question.rows, gpu)),
    )


def row_length(recipe: Recipe, architecture: Architecture, rows: Rows, packing: bool) -> int:
    """Tokens of the longest row as it is computed."""
    length = recipe.data.max_length
    if rows.longest is not None and not packing:
        length = min(length, rows.longest)
    return min(length, architecture.max_positions or length)


def _fixed_micro_batch(recipe: Recipe) -> int | None:
    size = recipe.training.micro_batch_size
    return None if size == "auto" else size


def _fixed_mode(recipe: Recipe) -> Mode | None:
    mode = recipe.training.checkpointing
    return None if mode == "auto" else mode


def _memory(plan: Plan, gpu: Gpu, reserved: float) -> MemoryEstimate:
    peak, found, held = training_peak(plan), need(plan, gpu), weights(plan)
    low, likely, high = (size / GIB for size in found.allocated)
    workspaces = Part("cuBLAS workspaces", gpu.workspaces, "two threads, one each")
    moment, parts = peak.moment, (*peak.parts, workspaces)
    if found.step < found.allocated[1]:
        moment, parts = "loading", loading_parts(plan)
    return MemoryEstimate(
        low_gib=low,
        likely_gib=likely,
        high_gib=high,
        step_gib=found.step / GIB,
        reserved_gib=found.reserved / GIB,
        card_gib=found.card / GIB,
        needed_gib=found.high / GIB,
        available_gib=(gpu.memory - reserved) / GIB,
        context_gib=found.context / GIB,
        loading_gib=loading_peak(plan) / GIB,
        base_gib=held.base() / GIB,
        adapter_gib=(held.trained + copies_of_factors(plan)) / GIB,
        states_gib=held.states / GIB,
        paged_gib=held.paged / GIB,
        host_gib=host_bytes(plan) / GIB,
        moment=moment,
        parts=tuple(MemoryPart(x.name, x.size / GIB, x.formula) for x in parts),
    )


def _offload_needs(recipe: Recipe, question: Question) -> float:
    """The least host memory with which the run would fit, in GiB; 0 where the host has it."""
    fitting = [
        host_bytes(plan)
        for plan in question.all_plans(recipe)
        if plan.offload and verdict(plan, question.gpu, question.reserved) == "fits"
    ]
    least = min(fitting, default=0.0)
    return least / GIB if least > question.host else 0.0


def _merge(recipe: Recipe, plan: Plan) -> MergeEstimate | None:
    if not recipe.method.mergeable:
        return None
    rounded = plan.quantization is not None
    return merge_estimate(plan.architecture, plan.trainable, rounded=rounded)


def _settings(plan: Plan, *, packing: bool) -> Settings:
    return Settings(
        micro_batch_size=plan.micro_batch,
        accumulation=plan.accumulation,
        checkpointing=plan.mode,
        attention=plan.kernel,
        optimizer=plan.optimizer,
        tokens_per_row=plan.length,
        packing=packing,
    )


def _limits(recipe: Recipe, plan: Plan, question: Question) -> Limits:
    """The most that fits at the thriftiest that the recipe leaves open."""
    thrifty = plan.checkpointed(_fixed_mode(recipe) or modes(plan)[-1])
    length = longest_row(thrifty, question.gpu, question.reserved)
    length = min(length, plan.architecture.max_positions or length)
    rows = largest_micro_batch(thrifty, question.gpu, question.reserved)
    most = replace(thrifty, micro_batch=rows), replace(thrifty, micro_batch=1, length=length)
    return Limits(
        micro_batch_size=rows,
        tokens_per_row=length,
        checkpointing=thrifty.mode,
        host_gib=max(map(host_bytes, most)) / GIB,
    )


def _time(
    recipe: Recipe, plan: Plan, question: Question, lengths: Lengths, price: float | None
) -> TimeEstimate | None:
    steps = _steps(recipe, plan, question.rows)
    gpu = question.gpu
    prices = (price, price) if price is not None else gpu.price_per_hour_usd
    found = duration(plan, gpu, steps or 1, lengths, prices)
    if found is None:
        return None
    step = TimeEstimate(found.step_seconds, found.tokens_per_second, gpu.speed)
    if prices:
        low, high = (each * 1e6 / 3600 / found.tokens_per_second for each in prices)
        step = replace(step, low_usd_per_million_tokens=low, high_usd_per_million_tokens=high)
    if steps is None:
        return step
    low, likely, high = found.seconds
    cheap, dear = found.cost_usd or (None, None)
    return replace(
        step,
        steps=steps,
        low_seconds=low,
        likely_seconds=likely,
        high_seconds=high,
        low_cost_usd=cheap,
        high_cost_usd=dear,
    )


def _steps(recipe: Recipe, plan: Plan, rows: Rows) -> int | None:
    """Optimizer steps of the whole run; None where the rows are not known."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    if rows.count is None:
        return None
    sequences = rows.count
    if packs(recipe, plan.architecture) and rows.mean:
        sequences = math.ceil(rows.count * rows.mean / plan.length)
    each = math.ceil(sequences / recipe.training.batch_size)
    return max(1, math.ceil(recipe.training.epochs * each))


def _other(gpu: Gpu) -> OtherGpu:
    cheap, dear = gpu.price_per_hour_usd or (None, None)
    return OtherGpu(gpu.name, gpu.memory / GIB, cheap, dear)
