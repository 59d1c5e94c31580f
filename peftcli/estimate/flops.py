"""Operations that a token costs: of matrix products and of attention."""

from __future__ import annotations

from functools import lru_cache

from peftcli.architecture.config import Linear
from peftcli.estimate.layer import first_kept
from peftcli.estimate.plan import Plan


def flops_per_token(plan: Plan, tokens_per_row: float) -> tuple[float, float]:
    """FLOPs of matrix products and of attention that a token costs, recomputation included.

    It attends to what precedes it in a row of that many tokens. A frozen weight needs its input's
    gradient only: two products instead of three.
    """
    architecture = plan.architecture
    head = architecture.vocab_size * architecture.hidden_size
    head_factor = 6.0 if plan.trains_base or plan.trains_head else 4.0
    if plan.loss == "chunked":
        head_factor += plan.step.head_again
    products = layer_flops(plan) + head_factor * head + _update_flops(plan)
    width = architecture.heads * architecture.head_size
    if plan.kernel == "eager":  # all pairs, which are masked then
        forward = 4.0 * width * tokens_per_row
    else:
        span = min(tokens_per_row, architecture.sliding_window or tokens_per_row)
        forward = 2.0 * width * span
    kept = architecture.layers - first_kept(plan)
    attention = first_kept(plan) + kept * 3.5 + _computed_again(plan)
    return float(products), forward * attention


def _update_flops(plan: Plan) -> int:
    """FLOPs of a token's products with the adapters; embeddings are looked up, not multiplied."""
    values = sum(x.count * plan.rank_of(x) * (x.inputs + x.outputs) for x in passed_targets(plan))
    layers = plan.architecture.layers if plan.layers is None else len(plan.layers)
    values += layers * plan.sites * 2 * plan.bottleneck * plan.architecture.hidden_size
    return 6 * values


@lru_cache(1024)
def layer_flops(plan: Plan) -> float:
    """FLOPs of a token's products with the weights of the layers.

    Layers below the lowest adapter run forward only.
    """
    architecture, linears = plan.architecture, linears_of_layers(plan)
    body = sum(x.count * x.weights for x in linears)
    body += sum(e.parameters() // e.count * e.active for e in architecture.experts)
    below = first_kept(plan) / architecture.layers
    passes = body * (2 * below + (6 if plan.trains_base else 4) * (1 - below))
    if not plan.step.last_again:
        body -= sum(x.count * x.weights for x in linears if x.suffix == "down_proj")
    return passes + 2 * body * _computed_again(plan) / architecture.layers


def linears_of_layers(plan: Plan) -> list[Linear]:
    """Those of the layers."""
    return [x for x in plan.architecture.linears if x.kind not in ("head", "vision")]


def passed_targets(plan: Plan) -> list[Linear]:
    """Those with a low-rank update that a token of text passes: no image is trained on."""
    return [x for x in plan.targets if x.kind != "vision"]


def _computed_again(plan: Plan) -> int:
    """Layers that run forward twice."""
    return max(0, plan.again - first_kept(plan))
