"""Gradients, and what an optimizer makes of them while it steps."""

from __future__ import annotations

from peftcli.estimate.layer import STAY
from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan
from peftcli.estimate.updating import LARGE
from peftcli.estimate.weights import Weights, weights


def gradients(held: Weights, share: float, what: str) -> Part:
    """So much of all gradients."""
    return Part("gradients", held.gradients * share, what)


def first_gradients(plan: Plan, held: Weights) -> Part:
    """Those beside the inputs of layers, which get fewer as the gradients get more.

    Where inputs wait in host memory there are as many at the second layer as at the last one.
    """
    layers = plan.architecture.layers
    if plan.offload:
        return gradients(held, max(1, layers - STAY) / layers, "of all layers but two")
    return gradients(held, 1 / layers, "of the last layer")


def end_to_end(plan: Plan, held: Weights) -> tuple[Part, ...]:
    """The copy of small gradients in one tensor, while the single ones are still there."""
    if not plan.flat or plan.trains_base:
        return ()
    size = held.gradients - plan.adapter_bytes * _alone(plan)
    return (Part("gradients end to end", size, "a copy for the optimizer"),)


def _alone(plan: Plan) -> int:
    """Values of parameters that are too large to be joined: wide factors, embeddings, a head."""
    sides = [
        (x.count, side * plan.rank_of(x)) for x in plan.targets for side in (x.inputs, x.outputs)
    ]
    bottlenecks = plan.sites * 2 * plan.bottleneck * plan.architecture.hidden_size
    rest = plan.trainable - sum(count * size for count, size in sides)
    layers = plan.architecture.layers if plan.layers is None else len(plan.layers)
    rest -= bottlenecks * layers
    table = _largest(plan)
    whole = max(0, rest) // table * table if table > LARGE else 0
    if plan.bottleneck * plan.architecture.hidden_size > LARGE:
        whole += bottlenecks * layers
    return whole + sum(count * size for count, size in sides if size > LARGE)


def head_gradient(plan: Plan) -> tuple[Part, ...]:
    """The gradient that full fine-tuning has first."""
    if not plan.trains_base:
        return ()
    size = float(plan.base_bytes * _largest(plan))
    return (Part("gradient of the head", size, "there before the layers' own"),)


def embedding_gradient(plan: Plan) -> tuple[Part, ...]:
    """The gradient of a tied embedding, before it is added to the head's and to earlier ones."""
    if not (plan.trains_base and plan.architecture.tied_embeddings):
        return ()
    copies = 2 if plan.accumulation > 1 else 1
    size = float(copies * plan.adapter_bytes * _largest(plan))
    return (Part("gradient of the embedding", size, "beside the sum"),)


def temporaries_of_update(plan: Plan) -> tuple[Part, ...]:
    """What an optimizer makes while it steps: transformers' Adafactor for the largest weight."""
    if plan.optimizer == "adamw_torch":
        size = weights(plan).gradients
        return (Part("roots of the second moments", size, "of all values at once"),)
    if plan.optimizer != "adafactor" or not plan.trains_base:
        return ()
    size = 2.0 * plan.adapter_bytes * _largest(plan)
    return (Part("update of the largest weight", size, "and the squares that it is scaled by"),)


def _largest(plan: Plan) -> int:
    return plan.architecture.vocab_size * plan.architecture.hidden_size
