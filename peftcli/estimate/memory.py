"""The peak of GPU memory in training, by part, as a closed form.

The peak is the largest of a few moments of a step; each is a sum of named parts. Derived by
following every allocation of the real forward and backward pass; the closed form is within about
one percent of that on dense Llama-like models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from peftcli.estimate.gradients import (
    embedding_gradient,
    end_to_end,
    first_gradients,
    gradients,
    head_gradient,
    temporaries_of_update,
)
from peftcli.estimate.groups import factors_and_room
from peftcli.estimate.layer import (
    Kinds,
    attention_masks,
    before_the_first_adapter,
    first_kept,
    kept_layers,
    kept_per_token,
    kept_tensors,
    offloaded_layers,
)
from peftcli.estimate.loss import head_chunks, logits_tile, loss_parts
from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan
from peftcli.estimate.transients import (
    attention_backward,
    backward_moments,
    expanded,
    first_attention,
    first_block,
    magnitudes,
)
from peftcli.estimate.weights import Weights, by_sides, scale_bytes, state_bytes, weights
from peftcli.estimate.widths import Widths

GIB = 2**30
OPTIMIZER_STEP = "optimizer step"


@dataclass(frozen=True, eq=False)
class Peak:
    """The fullest moment of a training step."""

    moment: str
    parts: tuple[Part, ...]
    passing: float
    """Bytes that are there in this part of a step only: activations, gradients, temporaries."""
    paged: float
    """Bytes of optimizer states that are on the GPU too, but leave it when it is full."""
    with_copy: float = 0.0
    """Bytes held once the gradients are copied end to end, where what is free is too small."""

    @property
    def size(self) -> float:
        """Bytes that PyTorch allocates at this moment, beside the workspace of cuBLAS."""
        return sum(part.size for part in self.parts)


@lru_cache(1024)
def training_peak(plan: Plan) -> Peak:
    """The largest of the moments of a step."""
    held = weights(plan)
    found = moments(plan, held)
    name = max(found, key=lambda key: sum(part.size for part in found[key]))
    parts = (*static_parts(plan, held), *found[name])
    passing = sum(part.size for part in found[name])
    peak = Peak(
        *(name, tuple(part for part in parts if part.size), passing, held.paged),
        with_copy=_with_copy(plan, held, found),
    )
    if not plan.offload:
        return peak
    with_all = training_peak(replace(plan, offload=False))  # never less at any moment
    return min(with_all, peak, key=lambda found: found.size)


ROOM = 0.4
"""Of what a layer's backward pass leaves free in large blocks, the share that the copy of all
gradients can use: in three runs of the grid, at rank 256, 128 and 64."""


def _with_copy(plan: Plan, held: Weights, found: dict[str, tuple[Part, ...]]) -> float:
    """What is held where that copy lies beyond most of what was there before.

    The single gradients lie among what the layers' inputs leave free, and cut it up; with several
    micro-batches they have been there since the first.
    """
    if plan.accumulation > 1:
        return 0.0
    copy = sum(part.size for part in end_to_end(plan, held))
    fullest = max(
        (parts for name, parts in found.items() if name != OPTIMIZER_STEP),
        key=lambda parts: sum(part.size for part in parts),
    )
    pieces = ("activations", "gradients")
    free = sum(part.size for part in fullest if part.name not in pieces)
    before = sum(part.size for part in (*static_parts(plan, held), *fullest))
    return before + copy - ROOM * free if copy > ROOM * free else 0.0


def host_bytes(plan: Plan) -> float:
    """Bytes of host memory that the layers' inputs take."""
    each = plan.step.stream * plan.architecture.hidden_size
    return offloaded_layers(plan) * plan.tokens * each


def static_parts(plan: Plan, held: Weights) -> tuple[Part, ...]:
    """What is there at every moment."""
    plain = plan.architecture.parameters() - held.elements
    small, name = "", "base, quantised"
    if held.form is not None:
        small = f"{held.elements:,} x {held.form.bytes_per_weight:.4f} B"
        tables = f", and {held.modules} tables of {held.form.tables:,} B"
        small += tables if held.form.tables else ""
        name = f"base, {held.form.name}"
    return (
        Part(name, held.quantized, small),
        Part("base, not quantised", held.plain, f"{plain:,} x {plan.base_bytes} B"),
        Part("adapter", held.trained, f"{plan.trainable:,} x {plan.adapter_bytes} B"),
        Part("optimizer states", held.states, _states(plan, held)),
        *factors_and_room(plan),
    )


def _states(plan: Plan, held: Weights) -> str:
    """How the optimizer's states are counted."""
    if by_sides(plan):
        return f"4 B for each row and column of the trained matrices, {plan.optimizer}"
    value = plan.base_bytes if plan.trains_base else plan.adapter_bytes
    each = state_bytes(plan.optimizer, value) + scale_bytes(plan.optimizer)
    text = f"{plan.trainable:,} x {each:g} B, {plan.optimizer}"
    return f"{text}; paged ones not counted" if held.paged else text


def moments(plan: Plan, held: Weights) -> dict[str, tuple[Part, ...]]:
    """What is there beside `static_parts` at the fullest moments of a step, by moment."""
    kinds = kept_layers(plan)
    widest, wide = max(kinds, key=lambda kind: kept_per_token(*kind))
    forward = _kept(plan, kinds)
    if plan.accumulation > 1:
        forward = (*forward, gradients(held, 1.0, "of the micro-batches before"))
    cast = (*forward, *_base_copies(plan, forward=True))
    forward = (*forward, *_base_copies(plan))
    again = plan.checkpointing and plan.lowest is None  # the last layer, whose turn is first
    backward = (*forward, *(_again(widest, wide) if again else ()))
    if plan.accumulation == 1 and plan.checkpointing:
        backward = (*backward, first_gradients(plan, held), *head_gradient(plan))
    nearly = 1 - 1 / plan.architecture.layers
    last = (gradients(held, nearly, "of all layers but one"), *_again(widest, wide))
    every = gradients(held, 1.0, "of all layers")
    ended = (every, *embedding_gradient(plan))
    passing = backward_moments(plan, wide, again=again)
    found = {name: (*backward, *parts) for name, parts in passing.items()}
    if plan.checkpointing and plan.trains_base and plan.base_bytes == 4:
        found["backward of the feed-forward block, first layer"] = (*last, *first_block(plan, wide))
        found["backward of attention, first layer"] = (every, *first_attention(plan, wide))
    if plan.lowest is not None:
        found |= _highest_again(plan, held, kinds)
    if plan.magnitudes:
        weighed = magnitudes(plan, wide)
        found["weights of DoRA"] = (*forward, *_again(widest, wide), *weighed)
        if plan.checkpointing:
            found["weights of DoRA, first layer"] = (*last, *weighed)
    if plan.checkpointing and plan.step.base_copies:
        found["forward pass of the last layer"] = (*cast, _passing(plan, wide))
    return found | {
        "forward pass of the loss": (*cast, logits_tile(plan), *_chunks(plan)),
        "loss": (*forward, *loss_parts(plan)),
        "backward of attention": (*forward, *attention_backward(plan, wide)),
        "end of the backward pass": (*last, *expanded(plan, wide, 2.0)),
        "gradient of the embedding": ended,
        OPTIMIZER_STEP: (
            gradients(held, 1.0, "of all layers"),
            *end_to_end(plan, held),
            *temporaries_of_update(plan),
        ),
    }


def _passing(plan: Plan, widths: Widths) -> Part:
    """What a layer that will be computed again has at the end of its feed-forward block.

    The stream, the block's input, and of its own width two factors and their product.
    """
    wide = (6.0 if widths.gated else 4.0) * widths.intermediate
    each = wide + (plan.step.stream + 2.0) * widths.hidden
    return Part(
        "a layer's forward pass", plan.tokens * each, f"{plan.tokens:,} tokens x {each:,.0f} B"
    )


def _kept(plan: Plan, kinds: Kinds) -> tuple[Part, ...]:
    """What the forward pass leaves for the backward pass."""
    tokens, step, wide = plan.tokens, plan.step, plan.architecture.hidden_size
    rotary = step.rotary * plan.architecture.head_size * tokens + attention_masks(plan)
    layers = sum(kind.layers_below(plan.again) for _, kind in kinds) - offloaded_layers(plan)
    inputs = layers * step.stream * wide
    text = f"{layers} layers x {tokens:,} tokens x {step.stream * wide:,.0f} B"
    text += ": the layers' inputs only"
    if plan.checkpointing and plan.lowest is None:
        return (Part("activations", tokens * inputs + rotary, text),)
    whole = [(own, kind.above(plan.again)) for own, kind in kinds]
    whole = [(own, kind) for own, kind in whole if kind.layers]
    total = inputs + sum(kind.layers * kept_per_token(own, kind) for own, kind in whole)
    if plan.again <= first_kept(plan):
        total -= before_the_first_adapter(*kinds[0])
    text = " + ".join(
        [text] * bool(layers)
        + [f"{kind.layers} layers x {tokens:,} tokens x {_named(own, kind)}" for own, kind in whole]
    )
    parts = [Part("activations", tokens * total + rotary, text)]
    if plan.adapter_bytes == 4 and not plan.trains_base and not step.in_groups:
        copies = plan.trainable * step.adapter_copies
        parts.append(Part("16-bit copies of the adapter", copies, "kept by autocast, 2 B each"))
    return tuple(parts)


def _highest_again(plan: Plan, held: Weights, kinds: Kinds) -> dict[str, tuple[Part, ...]]:
    """The highest layer of those that are computed again; those above it are done."""
    inputs = _kept(replace(plan, lowest=None), _below(kinds, plan.again))
    own, wide = max(kinds, key=lambda kind: kept_per_token(*kind))
    share = 1 - plan.again / plan.architecture.layers
    there = (*inputs, *_again(own, wide), gradients(held, share, "of the layers above"))
    return {
        f"{name}, computed again": (*there, *parts)
        for name, parts in backward_moments(plan, wide, again=True).items()
    }


def _below(kinds: Kinds, end: int) -> Kinds:
    """The kinds of the layers below that one."""
    found = [(own, replace(x, indices=tuple(i for i in x.indices if i < end))) for own, x in kinds]
    return tuple((own, kind) for own, kind in found if kind.layers)


def _named(plan: Plan, kind: Widths) -> str:
    """The bytes per token of a layer, and what they are."""
    kept = {name: size for name, size in kept_tensors(plan, kind).items() if size}
    return (
        f"{sum(kept.values()):,.0f} B ("
        + ", ".join(f"{name} {size:,.0f}" for name, size in kept.items())
        + ")"
    )


def _base_copies(plan: Plan, forward: bool = False) -> tuple[Part, ...]:
    """16-bit copies of float32 weights, which autocast keeps until the forward pass has ended.

    Later, layers that are computed again have them one at a time, as frozen ones always do. DoRA
    with dropout multiplies once more by the base, with a copy of its weights that it has made.
    """
    linears = [x for x in plan.architecture.linears if x.kind != "head"]
    size = plan.step.base_copies * sum(x.count * x.weights for x in linears)
    if plan.magnitudes and plan.dropout:
        size += 2.0 * sum(x.count * x.weights for x in plan.targets)
    if plan.checkpointing and not (forward and plan.trains_base):
        size /= plan.architecture.layers
    return (Part("16-bit copies of the base", size, "2 B per weight"),)


def _again(plan: Plan, wide: Widths) -> tuple[Part, ...]:
    """The one layer that checkpointing has computed again."""
    if not plan.checkpointing:
        return ()
    each = kept_per_token(plan, wide)
    if plan.step.in_groups or plan.step.float32_outputs:
        # Its input is held already; its last adapter is done with its own.
        each -= (plan.step.stream + plan.step.kept_site * bool(plan.bottleneck)) * wide.hidden
    text = f"{plan.tokens:,} tokens x {_named(plan, wide)}: one layer, computed again"
    return (Part("recomputed layer", plan.tokens * each, text),)


def _chunks(plan: Plan) -> tuple[Part, ...]:
    return (head_chunks(plan),) if plan.trains_base and plan.base_bytes == 4 else ()
