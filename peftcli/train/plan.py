"""What `auto` means for this run: micro-batch, checkpointing, packing, steps; with reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from peftcli.architecture.shapes import Architecture
from peftcli.estimate.plan import Mode, mode_of
from peftcli.estimate.result import Estimate
from peftcli.recipe.checks import ONE_AT_A_TIME
from peftcli.recipe.schema import Recipe

EVALUATIONS = 10
FEWEST_STEPS = 20  # between evaluations: each also writes a checkpoint
CPU_TOKENS = 4096  # beyond this many tokens a batch no longer gets faster on a CPU


@dataclass(frozen=True)
class Plan:
    """The resolved shape of a run."""

    micro_batch_size: int
    accumulation: int
    checkpointing: bool
    offload: bool
    """Whether the checkpointed layers' inputs wait in host memory."""
    lowest: int | None
    """How many layers are checkpointed, from the lowest on; None for all, where any is."""
    packing: bool
    steps: int
    warmup_steps: int
    eval_steps: int | None
    save_steps: int
    reasons: tuple[str, ...]
    """One sentence for each value that `auto` decided."""

    @property
    def mode(self) -> Mode:
        """What checkpointing is, in the recipe's words."""
        return mode_of(self.checkpointing, self.offload, self.lowest)


def decide(recipe: Recipe, *, rows: int, has_eval: bool, packing: bool, load: Load) -> Plan:
    """The plan for `rows` training sequences; `load` is what the device was found to bear."""
    steps = count_steps(recipe, rows)
    eval_steps = _eval_steps(recipe, steps) if has_eval else None
    return Plan(
        micro_batch_size=load.micro_batch_size,
        accumulation=recipe.training.batch_size // load.micro_batch_size,
        checkpointing=load.mode != "none",
        offload=load.mode == "offload",
        lowest=load.mode if isinstance(load.mode, int) else None,
        packing=packing,
        steps=steps,
        warmup_steps=_warmup(recipe.training.warmup, steps),
        eval_steps=eval_steps,
        save_steps=_save_steps(recipe, steps, eval_steps),
        reasons=load.reasons,
    )


@dataclass(frozen=True)
class Load:
    """How much the device gets at a time, and why."""

    micro_batch_size: int
    mode: Mode
    reasons: tuple[str, ...]


def cpu_load(recipe: Recipe, longest: int) -> Load:
    """On a CPU memory is not short, and larger batches stop paying early."""
    training = recipe.training
    reasons = []
    if training.micro_batch_size != "auto":
        micro = training.micro_batch_size
    else:
        divisors = [d for d in range(1, training.batch_size + 1) if training.batch_size % d == 0]
        micro = max([d for d in divisors if d * longest <= CPU_TOKENS], default=1)
        reasons.append(
            f"micro_batch_size {micro}: rows of up to {longest:,} tokens, about {CPU_TOKENS:,} "
            "tokens a forward pass on a CPU"
        )
    mode: Mode = "none" if training.checkpointing == "auto" else training.checkpointing
    if training.checkpointing == "auto":
        reasons.append("checkpointing none: memory is not short on a CPU")
    if mode == "offload":
        mode = "full"
        reasons.append("checkpointing full: on a CPU the layers' inputs are in host memory anyway")
    return Load(micro, mode, tuple(reasons))


def gpu_load(recipe: Recipe, estimate: Estimate) -> Load:
    """The fastest setting that the estimate says fits the card."""
    settings, memory = estimate.settings, estimate.memory
    reasons = []
    for key, chosen, wanted in (
        ("micro_batch_size", settings.micro_batch_size, recipe.training.micro_batch_size),
        ("checkpointing", settings.checkpointing, recipe.training.checkpointing),
    ):
        if wanted == "auto":
            reasons.append(
                f"{key} {chosen}: the fastest that fits {memory.available_gib:.0f} GiB, "
                f"estimated peak {memory.likely_gib:.1f} GiB"
            )
    if memory.host_gib:
        reasons.append(f"{memory.host_gib:.1f} GiB of host memory for the layers' inputs")
    wanted = recipe.training.checkpointing
    mode = settings.checkpointing if wanted == "auto" else wanted
    return Load(settings.micro_batch_size, mode, tuple(reasons))


def blind_load(recipe: Recipe) -> Load:
    """What takes least on a GPU, for a model whose memory cannot be estimated."""
    training = recipe.training
    micro = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    mode: Mode = "full" if training.checkpointing == "auto" else training.checkpointing
    reasons = [
        f"{key} {chosen}: takes least; write more where it fits"
        for key, chosen, wanted in (
            ("micro_batch_size", micro, training.micro_batch_size),
            ("checkpointing", mode, training.checkpointing),
        )
        if wanted == "auto"
    ]
    return Load(micro, mode, tuple(reasons))


def with_doubt(load: Load, architecture: Architecture) -> Load:
    """The load, with what is not known of a hybrid's memory."""
    if architecture.other_layers is None:
        return load
    doubt = (
        f"the memory of {architecture.model_type} models cannot be estimated: not all of their "
        f"layers are attention ({architecture.other_layers})"
    )
    return replace(load, reasons=(doubt, *load.reasons))


def in_full(load: Load, layers: int) -> Load:
    """The load of a model of so many layers: a number of all of them is `full`, which is said."""
    if load.mode != layers:
        return load
    reason = f"checkpointing full: the model has {layers} layers, all of which the recipe names"
    return replace(load, mode="full", reasons=(*load.reasons, reason))


def behind_a_mask(load: Load) -> Load:
    """The load of sequences that are computed one by one, which is said."""
    return replace(load, reasons=(ONE_AT_A_TIME, *load.reasons))


def count_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the whole run; a last, smaller batch of an epoch counts."""
    training = recipe.training
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.epochs * math.ceil(rows / training.batch_size)))


def smaller(plan: Plan, *, offload: bool = False) -> Plan | None:
    """The plan with half the rows at a time (or fewer) and the same batch.

    One row goes on with every layer checkpointed where some were, and then, with `offload`, with
    the layers' inputs in host memory. None where nothing is left.
    """
    batch = plan.micro_batch_size * plan.accumulation
    for rows in range(plan.micro_batch_size // 2, 0, -1):
        if batch % rows == 0:
            return with_rows(plan, rows)
    if plan.lowest is not None:
        return replace(plan, lowest=None)
    return replace(plan, offload=True) if offload and plan.mode == "full" else None


def with_rows(plan: Plan, rows: int) -> Plan:
    """The plan with that many rows at a time and the same batch."""
    batch = plan.micro_batch_size * plan.accumulation
    return replace(plan, micro_batch_size=rows, accumulation=batch // rows)


def _eval_steps(recipe: Recipe, steps: int) -> int:
    if recipe.evaluation.steps is not None:
        return min(recipe.evaluation.steps, steps)
    every = max(steps // EVALUATIONS, min(steps, FEWEST_STEPS))
    saves = recipe.training.save_steps
    if saves is None:
        return every
    return max(d for d in range(1, saves + 1) if saves % d == 0 and d <= every)


def _save_steps(recipe: Recipe, steps: int, eval_steps: int | None) -> int:
    """A multiple of `eval_steps`, so that the best evaluation has its checkpoint."""
    wanted = recipe.training.save_steps or eval_steps or max(steps // EVALUATIONS, FEWEST_STEPS)
    return eval_steps if eval_steps and wanted % eval_steps else wanted


def _warmup(warmup: float, steps: int) -> int:
    """Steps of warm-up; the first has no learning rate, so a share leaves another after it."""
    return min(math.ceil(warmup * steps), steps - 1) if warmup < 1 else int(warmup)
