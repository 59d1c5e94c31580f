"""Estimate a recipe: memory by part, time, cost, what to change, and which GPUs would do."""

from __future__ import annotations

import math
from dataclasses import replace

from peftcli.architecture.config import Architecture
from peftcli.estimate.advice import Advice, Card, advise, as_yaml
from peftcli.estimate.duration import Lengths, duration
from peftcli.estimate.find import find_architecture
from peftcli.estimate.fit import (
    Verdict,
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
from peftcli.estimate.loading import loading_parts, loading_peak
from peftcli.estimate.memory import host_bytes, training_peak
from peftcli.estimate.merging import merge_estimate
from peftcli.estimate.notes import notes_on, refusal
from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan
from peftcli.estimate.question import Question, fixed_mode
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
from peftcli.recipe.checks import one_at_a_time, packs
from peftcli.recipe.schema import Recipe

NOTHING = Advice((), ())
OTHERS = 3  # cards that are named where this one does not do


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
    refused, advice = refusal(recipe, found, gpu), NOTHING
    if not refused and (always_advise or (state != "fits" and not never_advise)):
        card = Card(gpu, question.reserved, question.host)
        advice = advise(recipe, question.plans, card, 0 if brief else 3)
    word = _in_words(state, refused, advice)
    return Estimate(
        model=recipe.model.name,
        method=recipe.method.name,
        parameters=found.parameters(),
        trainable=plan.trainable,
        adapter_file_gib=4 * plan.trainable / GIB,  # float32, as they are trained
        gpu=gpu.name,
        verdict=word,
        memory=_memory(plan, gpu, question.reserved),
        settings=_settings(plan, packing=packs(recipe, found)),
        limits=_limits(recipe, plan, question) if state == "fits" and not brief else None,
        merge=_merge(recipe, plan),
        time=_time(recipe, plan, question, lengths, price),
        changes=tuple(
            Suggestion(x.line, x.consequence, x.saves / GIB, x.fits) for x in advice.single
        ),
        paste=as_yaml(advice.together),
        other_gpus=() if word == "fits" else _others(recipe, found, plan),
        refusal=refused,
        own_price=price is not None,
        offload_needs_gib=0.0 if state == "fits" else _offload_needs(recipe, question),
        notes=tuple(notes_on(recipe, plan, question.rows, gpu)),
    )


def _in_words(state: Verdict, refused: str, advice: Advice) -> str:
    """The verdict as it is told."""
    if refused:
        return "does not run"
    return "fits with changes" if state == "does not fit" and advice.together else state


def _memory(plan: Plan, gpu: Gpu, reserved: float) -> MemoryEstimate:
    peak, found, held = training_peak(plan), need(plan, gpu), weights(plan)
    low, likely, high = (size / GIB for size in found.allocated)
    workspace = Part("cuBLAS workspace", gpu.workspace, "one thread")
    moment, parts = peak.moment, (*peak.parts, workspace)
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
    """The least host memory with which a run would fit that does not so, in GiB; 0 for none."""
    fitting = [
        host_bytes(plan)
        for plan in question.all_plans(recipe)
        if host_bytes(plan) > question.host
        and verdict(plan, question.gpu, question.reserved) == "fits"
    ]
    return min(fitting, default=0.0) / GIB


def _merge(recipe: Recipe, plan: Plan) -> MergeEstimate | None:
    if not recipe.method.mergeable:
        return None
    rounded = plan.quantization in ("nf4", "fp4")  # fp8 is rounded row by row
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
    thrifty = plan.checkpointed(fixed_mode(recipe) or modes(plan)[-1])
    length = longest_row(thrifty, question.gpu, question.reserved)
    length = min(length, plan.architecture.max_positions or length)
    rows = largest_micro_batch(thrifty, question.gpu, question.reserved)
    if one_at_a_time(recipe, plan.architecture):
        rows = min(rows, 1)
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
    steps = question.steps(recipe, plan)
    gpu = question.gpu
    prices = (price, price) if price is not None else gpu.price_per_hour_usd
    found = duration(plan, gpu, steps or 1, lengths, prices)
    if found is None:
        return None
    step = TimeEstimate(found.step_seconds, *found.step_range, found.tokens_per_second, gpu.speed)
    if prices:
        tokens = found.tokens_per_second * found.step_seconds
        low, high = (
            hourly * 1e6 / 3600 * seconds / tokens
            for hourly, seconds in zip(prices, found.step_range, strict=True)
        )
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


def _others(recipe: Recipe, architecture: Architecture, plan: Plan) -> tuple[OtherGpu, ...]:
    """The cheapest cards that run the plan and that `train` takes the recipe on."""
    able = [gpu for gpu in gpus_that_fit(plan) if not refusal(recipe, architecture, gpu)]
    return tuple(map(_other, able[:OTHERS]))


def _other(gpu: Gpu) -> OtherGpu:
    cheap, dear = gpu.price_per_hour_usd or (None, None)
    return OtherGpu(gpu.name, gpu.memory / GIB, cheap, dear)
