"""Estimate a recipe: memory by part, time, cost, what to change, and which GPUs would do."""

from __future__ import annotations

import math
from dataclasses import replace

from peftcli.architecture.config import Architecture
from peftcli.estimate.duration import Lengths, duration
from peftcli.estimate.facts import method_notes, plan_of
from peftcli.estimate.find import find_architecture
from peftcli.estimate.fit import (
    CALIBRATED,
    candidates,
    changes,
    choose,
    gpus_that_fit,
    need,
    smallest,
    verdict,
)
from peftcli.estimate.gpus import GIB, Gpu
from peftcli.estimate.memory import loading_peak, training_peak
from peftcli.estimate.plan import Plan
from peftcli.estimate.result import (
    Advice,
    Estimate,
    MemoryEstimate,
    MemoryPart,
    OtherGpu,
    Rows,
    Settings,
    TimeEstimate,
)
from peftcli.recipe.checks import packs
from peftcli.recipe.schema import Recipe


def run(
    recipe: Recipe,
    gpu: Gpu,
    *,
    rows: Rows | None = None,
    architecture: Architecture | None = None,
    reserved_gib: float = 0.0,
    advise: bool = False,
) -> Estimate:
    """Estimate a recipe on a GPU of which others take `reserved_gib`.

    Changes are listed where it does not fit, and always with `advise`.

    Without `architecture` the model is looked for on this machine and in the catalog. Raises
    UsageError for an unknown model and ArtefactError for a broken config.json.
    """
    rows = rows or Rows()
    found = architecture or find_architecture(recipe.model.name)
    packing = packs(recipe, found)
    length = row_length(recipe, found, rows, packing)
    base = plan_of(recipe, found, gpu, length=length, packing=packing)
    plans = candidates(base, _fixed_micro_batch(recipe), _fixed_checkpointing(recipe))
    reserved = reserved_gib * GIB
    lengths = Lengths(length if packing else min(rows.mean or length, length), length)
    if rows.count:
        lengths = replace(lengths, rows=rows.count)
    plan = choose(plans, gpu, reserved, lengths) or smallest(plans)
    state = verdict(plan, gpu, reserved)
    advice = () if state == "fits" and not advise else changes(plan, gpu, reserved)
    others = () if state == "fits" else gpus_that_fit(plan)[:3]
    return Estimate(
        model=recipe.model.name,
        parameters=found.parameters(),
        trainable=plan.trainable,
        gpu=gpu.name,
        verdict=state,
        memory=_memory(plan, gpu, reserved),
        settings=_settings(plan),
        time=_time(recipe, plan, gpu, rows, lengths),
        changes=tuple(Advice(x.line, x.consequence, x.saves / GIB, x.fits) for x in advice),
        other_gpus=tuple(_other(x) for x in others),
        notes=(*notes_on(plan, rows), *method_notes(recipe.method)),
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


def _fixed_checkpointing(recipe: Recipe) -> bool | None:
    mode = recipe.training.checkpointing
    return None if mode == "auto" else mode == "full"


def _memory(plan: Plan, gpu: Gpu, reserved: float) -> MemoryEstimate:
    peak, found = training_peak(plan), need(plan, gpu)
    low, likely, high = (size / GIB for size in found.allocated)
    parts = [MemoryPart(x.name, x.size / GIB, x.formula) for x in peak.parts]
    parts.append(MemoryPart("cuBLAS workspaces", gpu.workspaces / GIB, "two threads, one each"))
    return MemoryEstimate(
        low_gib=low,
        likely_gib=likely,
        high_gib=high,
        needed_gib=found.high / GIB,
        available_gib=(gpu.memory - reserved) / GIB,
        context_gib=found.context / GIB,
        loading_gib=loading_peak(plan) / GIB,
        paged_gib=peak.paged / GIB,
        moment=peak.moment,
        parts=tuple(parts),
    )


def _settings(plan: Plan) -> Settings:
    return Settings(
        micro_batch_size=plan.micro_batch,
        accumulation=plan.accumulation,
        checkpointing="full" if plan.checkpointing else "none",
        attention=plan.kernel,
        optimizer=plan.optimizer,
        tokens_per_row=plan.length,
    )


def _time(
    recipe: Recipe, plan: Plan, gpu: Gpu, rows: Rows, lengths: Lengths
) -> TimeEstimate | None:
    steps = recipe.training.max_steps
    if steps is None and rows.count is not None:
        sequences = rows.count
        if packs(recipe, plan.architecture) and rows.mean:
            sequences = math.ceil(rows.count * rows.mean / plan.length)
        each = math.ceil(sequences / recipe.training.batch_size)
        steps = max(1, math.ceil(recipe.training.epochs * each))
    if steps is None:
        return None
    found = duration(plan, gpu, steps, lengths)
    if found is None:
        return None
    low, likely, high = found.seconds
    cheap, dear = found.cost_usd or (None, None)
    return TimeEstimate(
        steps, low, likely, high, found.step_seconds, found.tokens_per_second, cheap, dear
    )


def _other(gpu: Gpu) -> OtherGpu:
    cheap, dear = gpu.price_per_hour_usd or (None, None)
    return OtherGpu(gpu.name, gpu.memory / GIB, cheap, dear)


def notes_on(plan: Plan, rows: Rows) -> list[str]:
    """What the reader must know to trust or mistrust the figures."""
    architecture, notes = plan.architecture, []
    if not architecture.exact:
        notes.append(f"{architecture.model_type} is not known: sizes are those of a plain decoder")
    if architecture.model_type not in CALIBRATED:
        notes.append("the memory of this family was never checked: the band is wide")
    if plan.quantization and architecture.experts:
        held = sum(x.parameters() for x in architecture.experts) * plan.base_bytes / GIB
        notes.append(f"experts stay in 16 bits: bitsandbytes leaves {held:.1f} GiB of them alone")
    if architecture.quantization is not None:
        method = architecture.quantization.method
        notes.append(f"the checkpoint is stored in {method}; its weights are counted in 16 bits")
    if rows.longest is None:
        notes.append("the rows were not read: every row is taken as long as data.max_length")
    return notes
