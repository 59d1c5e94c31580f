"""What an optimizer's own step takes, on the GPU and on the CPU.

Constants come from steps of scripts/calibrate's grid on an H200 that are not held out.
"""

from __future__ import annotations

from functools import lru_cache

from peftcli.architecture.config import Architecture
from peftcli.estimate.gpus import Gpu
from peftcli.estimate.plan import Plan
from peftcli.estimate.weights import weights

PASSES = {"adafactor": 40.0, "adamw_torch": 22.0}
"""Times that something as large as the gradients is read or written. Unfused AdamW's are counted;
Adafactor's would be 21, but sums over columns and products with them reach half the card's rate."""
EIGHT_BIT_BYTES = 123.0
"""Bytes that could be moved while bitsandbytes updates one value with states in 8 bits."""
STEP_SECONDS = 0.003
"""On the CPU, for whatever comes once a step."""
TENSOR_SECONDS = {"adafactor": 0.000245, "adamw_torch": 0.000085}
"""On the CPU, for each tensor, where an optimizer takes them one after the other."""
LARGE_SECONDS = 0.0003
"""The same of bitsandbytes' optimizers, for tensors that are too large to be joined."""
LARGE = 2**22  # values (peftcli/train/flat.py)


def update_seconds(plan: Plan, gpu: Gpu) -> float:
    """What the GPU needs to change the trained values."""
    held = weights(plan)
    moved = 3 * (held.gradients + held.states + held.paged)
    if plan.optimizer in PASSES:
        moved = PASSES[plan.optimizer] * held.gradients
    if plan.optimizer.endswith("8bit"):
        moved = EIGHT_BIT_BYTES * plan.trainable
    return moved / (gpu.bandwidth_gb_s * 1e9)


@lru_cache(1024)
def host_seconds(plan: Plan) -> float:
    """What the CPU needs to start that, and for what else comes once a step."""
    each = TENSOR_SECONDS.get(plan.optimizer, 0.0) * _tensors(plan)
    if plan.flat:
        each = LARGE_SECONDS * _large(plan)
    return STEP_SECONDS + each


def _tensors(plan: Plan) -> int:
    """How many tensors are trained, near enough."""
    if plan.trains_base:
        return _of_base(plan.architecture)
    layers = plan.architecture.layers if plan.layers is None else len(plan.layers)
    factors = 3 if plan.magnitudes else 2
    return factors * sum(x.count for x in plan.targets) + 4 * layers * plan.sites


def _of_base(architecture: Architecture) -> int:
    """Tensors of the whole model; the experts of a layer are stacked."""
    biases = sum(x.count * x.bias for x in architecture.linears)
    linears = sum(x.count for x in architecture.linears) - architecture.tied_embeddings
    others = sum(max(1, len(x.layers)) for x in architecture.tensors)
    return linears + biases + others + sum(len(x.layers) for x in architecture.experts)


def _large(plan: Plan) -> int:
    if not plan.trains_base:
        return 0
    return sum(x.count for x in plan.architecture.linears if x.weights > LARGE)
