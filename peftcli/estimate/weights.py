"""Bytes that stay for the whole run: weights, adapters, gradients, optimizer states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from peftcli.architecture.shapes import CheckpointQuantization
from peftcli.estimate.plan import Plan

GROUP = 128  # weights that share a scale and a zero point (GPTQ and AWQ)
TILE = 128 * 128  # weights that share a scale (fp8)
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


@dataclass(frozen=True, eq=False)
class Storage:
    """How the quantised part of a base is held."""

    name: str
    bytes_per_weight: float
    tables: int
    """Bytes beside each module."""
    experts: bool
    """Whether the experts of a mixture are held so too."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Bytes by kind; `paged` are optimizer states that leave the GPU when it is full."""

    quantized: float
    plain: float
    trained: float
    gradients: float
    states: float
    paged: float
    form: Storage | None
    elements: int
    """Weights that are held in few bits."""
    modules: int

    def base(self) -> float:
        return self.quantized + self.plain


@lru_cache(1024)
def weights(plan: Plan) -> Weights:
    """All bytes that do not depend on the batch."""
    form = storage(plan)
    quantized, modules = quantized_elements(plan, form)
    plain = plan.architecture.parameters() - quantized
    size = plan.base_bytes if plan.trains_base else plan.adapter_bytes
    paged = paged_elements(plan)
    each, scales = state_bytes(plan.optimizer, size), scale_bytes(plan.optimizer)
    embeddings = _embedding_states(plan)
    total = plan.trainable * (each + scales) + embeddings
    if by_sides(plan):
        total = _sides(plan)
    leaves = paged * each + embeddings if plan.optimizer.startswith("paged") else 0.0
    return Weights(
        quantized=quantized * form.bytes_per_weight + modules * form.tables if form else 0.0,
        plain=plain * plan.base_bytes,
        trained=0.0 if plan.trains_base else plan.trainable * size,
        gradients=float(plan.trainable * size),
        states=total - leaves,
        paged=leaves,
        form=form,
        elements=quantized,
        modules=modules,
    )


def storage(plan: Plan) -> Storage | None:
    """How the base's linear weights are held; None for 16 or 32 bits.

    A checkpoint that is stored quantised is held as it is stored, whatever the recipe says.
    """
    stored = plan.architecture.quantization
    if stored is not None and stored.held:
        return _stored(stored)
    if plan.quantization is None:
        return None
    if plan.quantization == "fp8":
        return Storage("fp8", 1 + 4 / _mean_inputs(plan), 0, experts=False)
    return Storage("4-bit", four_bits(plan.double_quantization), TABLES, experts=False)


def _stored(stored: CheckpointQuantization) -> Storage:
    bits = stored.bits or 16
    if stored.method == "bitsandbytes":
        if bits == 8:
            return Storage("8-bit", 1.0, 0, experts=False)
        return Storage("4-bit", four_bits(stored.double), TABLES, experts=False)
    if stored.method == "fp8":
        return Storage("fp8", 1 + 4 / TILE, 0, experts=True)
    group = stored.group or GROUP
    each = bits / 8 + (2 + bits / 8) / group
    return Storage(f"{bits}-bit {stored.method}", each, 0, experts=True)


def four_bits(double: bool) -> float:
    """Bytes of one 4-bit weight with its share of the scales (QLoRA, arXiv 2305.14314)."""
    if double:
        return 0.5 + 1 / BLOCK + 4 / (BLOCK * SUPER_BLOCK)
    return 0.5 + 4 / BLOCK


def _mean_inputs(plan: Plan) -> float:
    """Weights that share a scale where each row has one."""
    chosen = [x for x in plan.architecture.linears if x.quantizable]
    return sum(x.count * x.weights for x in chosen) / sum(x.count * x.outputs for x in chosen)


def quantized_elements(plan: Plan, form: Storage | None) -> tuple[int, int]:
    """Weights that are held in few bits, and the number of their modules."""
    if form is None:
        return 0, 0
    chosen = [x for x in plan.architecture.linears if x.quantizable]
    experts = plan.architecture.experts if form.experts else ()
    matrices = [x for x in experts if len(x.shape) > 1]
    total = sum(x.count * x.weights for x in chosen) + sum(x.parameters() for x in matrices)
    return total, sum(x.count for x in chosen)


def largest_expanded(plan: Plan) -> int:
    """Elements of the largest weight that is expanded to 16 bits; 0 where none is."""
    if storage(plan) is None:
        return 0
    return max((x.weights for x in plan.architecture.linears if x.quantizable), default=0)


def state_bytes(optimizer: str, value_bytes: int) -> float:
    """Bytes of optimizer state for each trained value."""
    return STATE_BYTES.get(optimizer, 2.0 * value_bytes)


def scale_bytes(optimizer: str) -> float:
    """Bytes of the scales of 8-bit states, for each trained value; they are never paged."""
    return 4 / SUPER_BLOCK * STATE_BYTES[optimizer] if optimizer.endswith("8bit") else 0.0


def by_sides(plan: Plan) -> bool:
    """Whether states follow the sides of low-rank factors, which are long for their values."""
    return plan.optimizer == "adafactor" and bool(plan.targets)


def _sides(plan: Plan) -> float:
    """Adafactor's states: float32 means over rows and columns, and all values of magnitudes."""
    total = 0
    for target in plan.targets:
        sides = target.inputs + target.outputs + 2 * plan.rank_of(target)
        total += target.count * (sides + target.outputs * plan.magnitudes)
    return 4.0 * total


def _embedding_states(plan: Plan) -> float:
    """What embeddings take beyond 8 bits: transformers gives them 32-bit states all the same."""
    if not (plan.flat and plan.trains_base and plan.optimizer.endswith("adamw_8bit")):
        return 0.0
    embeddings = plan.architecture.vocab_size * plan.architecture.hidden_size
    return embeddings * (STATE_BYTES["paged_adamw_32bit"] - STATE_BYTES["adamw_8bit"])


def paged_elements(plan: Plan) -> int:
    """Trained values in tensors large enough to be paged."""
    if plan.flat:
        return plan.trainable if plan.trainable >= PAGED_FROM else 0
    hidden = plan.architecture.hidden_size
    if plan.bottleneck:
        big = plan.bottleneck * hidden >= PAGED_FROM
        each = 2 * plan.bottleneck * hidden if big else 0
        return plan.architecture.layers * plan.sites * each
    if not plan.targets:
        return plan.trainable
    sides = [
        (x.count, side * plan.rank_of(x)) for x in plan.targets for side in (x.inputs, x.outputs)
    ]
    return sum(count * size for count, size in sides if size >= PAGED_FROM)
