"""What the backward pass of one layer needs beside what is kept, moment by moment."""

from __future__ import annotations

from peftcli.estimate.layer import Widths, softcap
from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan
from peftcli.estimate.weights import largest_expanded, storage


def backward_moments(plan: Plan, wide: Widths) -> dict[str, tuple[Part, ...]]:
    """Temporaries of the backward pass of the widest layer, by moment."""
    moments = {
        "backward of the feed-forward block": (_mlp(plan, wide),),
        "backward of the up-projections": expanded(plan, wide, 0.0),
    }
    if plan.magnitudes:
        moments["weights of DoRA"] = (_magnitudes(plan),)
    return moments


def _mlp(plan: Plan, wide: Widths) -> Part:
    step = plan.step
    each = step.peak_mlp * wide.intermediate + step.peak_hidden * wide.hidden
    if not plan.checkpointing:
        each = max(0.0, each - step.peak_counted * wide.intermediate)
    text = f"{plan.tokens:,} tokens x {each:,.0f} B in the backward pass of the last layer"
    return Part("temporaries", plan.tokens * each, text)


def expanded(plan: Plan, wide: Widths, more_hidden: float) -> tuple[Part, ...]:
    """One 4-bit weight in 16 bits, and what is there beside it."""
    step, largest = plan.step, largest_expanded(plan)
    each = step.peak_mlp_dequantise * wide.intermediate
    each += (step.peak_hidden_dequantise + more_hidden) * wide.hidden
    text = f"{plan.tokens:,} tokens x {each:,.0f} B in the backward pass of a layer"
    size = step.dequantised * largest
    return (
        Part("temporaries", plan.tokens * each, text),
        Part("expanded weight", size, f"{largest:,} x {step.dequantised} B: one weight in 16 bits"),
    )


def attention_backward(plan: Plan, wide: Widths) -> tuple[Part, ...]:
    """The score matrices of the eager kernel's backward pass, in a layer that is computed again."""
    if plan.kernel != "eager" or not plan.checkpointing:
        return ()
    scores = plan.step.peak_scores + softcap(plan)
    scores *= plan.architecture.heads * plan.length
    each = 8 * wide.hidden + 4 * wide.query + 4 * wide.key + scores
    if wide.query != wide.key:
        each += 4 * (wide.query - wide.key)
    text = f"{plan.tokens:,} tokens x {each:,.0f} B: the scores of all pairs of tokens"
    return (Part("attention scores", plan.tokens * each, text),)


def _magnitudes(plan: Plan) -> Part:
    """PEFT sends an identity matrix through the update, and takes the length of each row of the sum
    with the weight."""
    each = plan.step.peak_scaled + (2 if storage(plan) else 0)
    sizes = [
        max(6 * x.inputs**2, 2 * x.inputs**2 + each * x.weights)
        for x in plan.targets
        if x.kind != "vision"
    ]
    text = "an identity matrix, the update multiplied out, and its sum with the weight"
    return Part("the update as a whole matrix", max(sizes, default=0.0), text)
