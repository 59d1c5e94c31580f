"""Bytes that stay for the whole run: weights, adapters, gradients, optimizer states."""

from __future__ import annotations

from dataclasses import dataclass

from peftcli.estimate.plan import Plan

BLOCK = 64  # weights that share one scale (bitsandbytes)
SUPER_BLOCK = 256  # scales that share one scale when they are quantised too
TABLES = 2048  # bytes of code tables and small tensors beside each 4-bit weight
PAGED_FROM = 100_000  # smaller tensors are not paged (bitsandbytes/optim/optimizer.py)

STATE_BYTES = {  # per trained value; optimizers that are not here keep two of its own dtype
    "paged_adamw_32bit": 8.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "lion_32bit": 4.0,
    "paged_lion_8bit": 1.0,
    "adafactor": 0.01,
    "sgd": 0.0,
}


@dataclass(frozen=True)
class Weights:
    """Bytes by kind; `paged` are optimizer states that leave the GPU when it is full."""

    quantized: float
    plain: float
    trained: float
    gradients: float
    states: float
    paged: float

    def base(self) -> float:
        return self.quantized + self.plain


def weights(plan: Plan) -> Weights:
    """All bytes that do not depend on the batch."""
    quantized, modules = quantized_elements(plan)
    plain = plan.architecture.parameters() - quantized
    size = plan.base_bytes if plan.trains_base else plan.adapter_bytes
    paged = paged_elements(plan)
    each = state_bytes(plan.optimizer, size)
    total = plan.trainable * each
    leaves = paged * each if plan.optimizer.startswith("paged") else 0.0
    return Weights(
        quantized=quantized * bytes_per_quantized(plan.double_quantization) + modules * TABLES,
        plain=plain * plan.base_bytes,
        trained=0.0 if plan.trains_base else plan.trainable * size,
        gradients=float(plan.trainable * size),
        states=total - leaves,
        paged=leaves,
    )


def bytes_per_quantized(double: bool) -> float:
    """Bytes of one 4-bit weight with its share of the scales (QLoRA, arXiv 2305.14314)."""
    if double:
        return 0.5 + 1 / BLOCK + 4 / (BLOCK * SUPER_BLOCK)
    return 0.5 + 4 / BLOCK


def quantized_elements(plan: Plan) -> tuple[int, int]:
    """Weights that are held in 4 bits, and the number of their modules."""
    if plan.quantization is None:
        return 0, 0
    chosen = [x for x in plan.architecture.linears if x.quantizable]
    return sum(x.count * x.weights for x in chosen), sum(x.count for x in chosen)


def largest_quantized(plan: Plan) -> int:
    """Elements of the largest weight that is expanded from 4 bits; 0 without quantisation."""
    if plan.quantization is None:
        return 0
    return max((x.weights for x in plan.architecture.linears if x.quantizable), default=0)


def state_bytes(optimizer: str, value_bytes: int) -> float:
    """Bytes of optimizer state for each trained value."""
    known = STATE_BYTES.get(optimizer, 2.0 * value_bytes)
    scales = 4 / SUPER_BLOCK * known if optimizer.endswith("8bit") else 0.0
    return known + scales


def paged_elements(plan: Plan) -> int:
    """Trained values in tensors large enough to be paged."""
    hidden = plan.architecture.hidden_size
    if plan.bottleneck:
        big = plan.bottleneck * hidden >= PAGED_FROM
        each = 2 * plan.bottleneck * hidden if big else 0
        return plan.architecture.layers * plan.sites * each
    if not plan.targets:
        return plan.trainable
    sides = [(x.count, side * plan.rank) for x in plan.targets for side in (x.inputs, x.outputs)]
    return sum(count * size for count, size in sides if size >= PAGED_FROM)
