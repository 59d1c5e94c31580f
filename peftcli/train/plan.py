"""What `auto` means for this run: micro-batch, checkpointing, packing, steps; with reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peftcli.recipe.schema import Recipe

EVALUATIONS = 10
CPU_TOKENS = 4096  # beyond this many tokens a batch no longer gets faster on a CPU


@dataclass(frozen=True)
class Plan:
    """The resolved shape of a run."""

    micro_batch_size: int
    accumulation: int
    checkpointing: bool
    packing: bool
    steps: int
    warmup_steps: int
    eval_steps: int | None
    save_steps: int
    reasons: tuple[str, ...]
    """One sentence for each value that `auto` decided."""


def decide(
    recipe: Recipe, *, rows: int, longest: int, plain_text: bool, on_gpu: bool, has_eval: bool
) -> Plan:
    """The plan for `rows` training sequences, the longest of `longest` tokens."""
    reasons: list[str] = []
    micro = _micro_batch(recipe, longest, on_gpu, reasons)
    steps = count_steps(recipe, rows)
    eval_steps = _eval_steps(recipe, steps) if has_eval else None
    return Plan(
        micro_batch_size=micro,
        accumulation=recipe.training.batch_size // micro,
        checkpointing=_checkpointing(recipe, on_gpu, reasons),
        packing=decide_packing(recipe, plain_text),
        steps=steps,
        warmup_steps=_warmup(recipe.training.warmup, steps),
        eval_steps=eval_steps,
        save_steps=_save_steps(recipe, steps, eval_steps),
        reasons=tuple(reasons),
    )


def decide_packing(recipe: Recipe, plain_text: bool) -> bool:
    """Whether several rows share a sequence; `auto` packs plain text."""
    packing = recipe.training.packing
    return plain_text if packing == "auto" else packing


def count_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the whole run; a last, smaller batch of an epoch counts."""
    training = recipe.training
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.epochs * math.ceil(rows / training.batch_size)))


def _eval_steps(recipe: Recipe, steps: int) -> int:
    if recipe.evaluation.steps is not None:
        return min(recipe.evaluation.steps, steps)
    every = max(1, steps // EVALUATIONS)
    saves = recipe.training.save_steps
    if saves is None:
        return every
    return max(d for d in range(1, saves + 1) if saves % d == 0 and d <= max(every, 1))


def _save_steps(recipe: Recipe, steps: int, eval_steps: int | None) -> int:
    """A multiple of `eval_steps`, so that the best evaluation has its checkpoint."""
    wanted = recipe.training.save_steps or eval_steps or max(1, steps // EVALUATIONS)
    return eval_steps if eval_steps and wanted % eval_steps else wanted


def _warmup(warmup: float, steps: int) -> int:
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def _micro_batch(recipe: Recipe, longest: int, on_gpu: bool, reasons: list[str]) -> int:
    training = recipe.training
    if training.micro_batch_size != "auto":
        return training.micro_batch_size
    budget = 8192 if on_gpu else CPU_TOKENS
    divisors = [d for d in range(1, training.batch_size + 1) if training.batch_size % d == 0]
    micro = max([d for d in divisors if d * longest <= budget], default=1)
    where = "on a GPU" if on_gpu else "on a CPU"
    reasons.append(
        f"micro_batch_size {micro}: rows of up to {longest:,} tokens, about {budget:,} tokens "
        f"a forward pass {where}"
    )
    return micro


def _checkpointing(recipe: Recipe, on_gpu: bool, reasons: list[str]) -> bool:
    wanted = recipe.training.checkpointing
    if wanted != "auto":
        return wanted == "full"
    reasons.append(
        "checkpointing full: activations are recomputed to save GPU memory"
        if on_gpu
        else "checkpointing none: memory is not short on a CPU"
    )
    return on_gpu
