"""The peak of GPU memory before the first step: while the base is loaded, and turned into fp8."""

from __future__ import annotations

from dataclasses import replace

from peftcli.estimate.groups import turning_into_fp8
from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan
from peftcli.estimate.weights import largest_expanded, weights


def loading_peak(plan: Plan) -> float:
    """Bytes at the fullest moment before the first step."""
    return sum(part.size for part in loading_parts(plan))


def loading_parts(plan: Plan) -> tuple[Part, ...]:
    """What is there at that moment: the weights, and one in 16 bits that becomes 4-bit.

    A base for fp8 loads in 16 bits, gets its adapters, and is turned into 8 bits then.
    """
    if plan.quantization == "fp8":
        whole = weights(replace(plan, quantization=None))
        text = "codes and factors of a group, and a part of a weight in float32"
        return (
            Part("base in 16 bits", whole.base(), "before it is turned into fp8"),
            Part("adapter", whole.trained, f"{plan.trainable:,} x {plan.adapter_bytes} B"),
            Part("turning into fp8", turning_into_fp8(plan), text),
        )
    largest = largest_expanded(plan)
    return (
        Part("base", weights(plan).base(), "as it stays"),
        Part("weight in 16 bits", 2.0 * largest, f"{largest:,} x 2 B: before it is quantised"),
    )
