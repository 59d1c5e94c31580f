"""The peak of GPU memory in training, by part, as a closed form.

The peak is the largest of a few moments of a step; each is a sum of named parts. Derived by
following every allocation of the real forward and backward pass; the closed form is within about
one percent of that on dense Llama-like models.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftcli.estimate.layer import Widths, kept_per_token, layer_kinds
from peftcli.estimate.plan import Plan
from peftcli.estimate.weights import (
    TABLES,
    Weights,
    bytes_per_quantized,
    largest_quantized,
    quantized_elements,
    state_bytes,
    weights,
)

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """One summand of the peak, in bytes, with the formula that gave it."""

    name: str
    size: float
    formula: str


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a training step."""

    moment: str
    parts: tuple[Part, ...]
    paged: float
    """Bytes of optimizer states that are on the GPU too, but leave it when it is full."""

    @property
    def size(self) -> float:
        """Bytes that PyTorch allocates at this moment, beside cuBLAS workspaces."""
        return sum(part.size for part in self.parts)


def training_peak(plan: Plan) -> Peak:
    """The largest of the moments of a step."""
    held = weights(plan)
    moments = {
        name: (*static_parts(plan, held), *parts) for name, parts in _moments(plan, held).items()
    }
    name = max(moments, key=lambda key: sum(part.size for part in moments[key]))
    kept = tuple(part for part in moments[name] if part.size)
    return Peak(name, kept, held.paged)


def loading_peak(plan: Plan) -> float:
    """Bytes while the base loads: the weights, and the largest tensor in 16 bits."""
    held = weights(plan)
    sizes = [x.weights for x in plan.architecture.linears]
    embedding = plan.architecture.vocab_size * plan.architecture.hidden_size
    return held.base() + 2 * max(embedding, *sizes)


def static_parts(plan: Plan, held: Weights) -> tuple[Part, ...]:
    """What is there at every moment."""
    elements, modules = quantized_elements(plan)
    plain = plan.architecture.parameters() - elements
    each = bytes_per_quantized(plan.double_quantization)
    small = f"{elements:,} x {each:.4f} B, and {modules} tables of {TABLES} B"
    value = plan.base_bytes if plan.trains_base else plan.adapter_bytes
    states = f"{plan.trainable:,} x {state_bytes(plan.optimizer, value):g} B, {plan.optimizer}"
    if held.paged:
        states += "; paged ones not counted"
    return (
        Part("base, 4-bit", held.quantized, small),
        Part("base, not quantised", held.plain, f"{plain:,} x {plan.base_bytes} B"),
        Part("adapter", held.trained, f"{plan.trainable:,} x {plan.adapter_bytes} B"),
        Part("optimizer states", held.states, states),
    )


def _moments(plan: Plan, held: Weights) -> dict[str, tuple[Part, ...]]:
    kinds = layer_kinds(plan.architecture)
    wide = max(kinds, key=lambda kind: kept_per_token(plan, kind))
    forward = (*_kept(plan, kinds), *_base_copies(plan))
    if plan.accumulation > 1:
        forward = (*forward, _gradients(held, 1.0, "of the micro-batches before"))
    backward = (*forward, *_again(plan, wide))
    if plan.accumulation == 1 and plan.checkpointing:
        share = 1 / plan.architecture.layers
        backward = (*backward, _gradients(held, share, "of the last layer"), *_head_gradient(plan))
    nearly = 1 - 1 / plan.architecture.layers
    last = (_gradients(held, nearly, "of all layers but one"), *_again(plan, wide))
    moments = {
        "loss": (*forward, *_loss(plan)),
        "backward of the feed-forward block": (*backward, _mlp_backward(plan, wide)),
        "backward of the up-projections": (*backward, *_expanded(plan, wide, 0.0)),
        "end of the backward pass": (*last, *_expanded(plan, wide, 2.0)),
        "optimizer step": (_gradients(held, 1.0, "of all layers"), *_head_twice(plan)),
    }
    if plan.kernel == "eager" and plan.checkpointing:
        moments["backward of attention"] = (*forward, _eager_backward(plan, wide))
    return moments


def _kept(plan: Plan, kinds: list[Widths]) -> tuple[Part, ...]:
    """What the forward pass leaves for the backward pass."""
    tokens, step = plan.tokens, plan.step
    rotary = step.rotary * plan.architecture.head_size * tokens
    if plan.checkpointing:
        each = step.stream * plan.architecture.hidden_size
        layers = plan.architecture.layers
        text = f"{layers} layers x {tokens:,} tokens x {each:,.0f} B: the layers' inputs only"
        return (Part("activations", layers * tokens * each + rotary, text),)
    total = sum(kind.layers * kept_per_token(plan, kind) for kind in kinds)
    text = " + ".join(
        f"{kind.layers} layers x {tokens:,} tokens x {kept_per_token(plan, kind):,.0f} B"
        for kind in kinds
    )
    parts = [Part("activations", tokens * total + rotary, text)]
    if plan.adapter_bytes == 4 and not plan.trains_base:
        copies = plan.trainable * step.adapter_copies
        parts.append(Part("16-bit copies of the adapter", copies, "kept by autocast, 2 B each"))
    return tuple(parts)


def _base_copies(plan: Plan) -> tuple[Part, ...]:
    """16-bit copies of float32 weights: of all layers, or of one where a layer is recomputed."""
    linears = [x for x in plan.architecture.linears if x.kind != "head"]
    size = plan.step.base_copies * sum(x.count * x.weights for x in linears)
    if plan.checkpointing and not plan.trains_base:
        size /= plan.architecture.layers
    return (Part("16-bit copies of the base", size, f"{plan.step.base_copies:g} B per weight"),)


def _again(plan: Plan, wide: Widths) -> tuple[Part, ...]:
    """The one layer that checkpointing has computed again."""
    if not plan.checkpointing:
        return ()
    each = kept_per_token(plan, wide)
    text = f"{plan.tokens:,} tokens x {each:,.0f} B: one layer, computed again"
    return (Part("recomputed layer", plan.tokens * each, text),)


def _mlp_backward(plan: Plan, wide: Widths) -> Part:
    step = plan.step
    each = step.peak_mlp * wide.intermediate + step.peak_hidden * wide.hidden
    if not plan.checkpointing:  # its input and product are counted among the activations
        each = max(0.0, each - 2 * wide.intermediate)
    text = f"{plan.tokens:,} tokens x {each:,.0f} B in the backward pass of the last layer"
    return Part("temporaries", plan.tokens * each, text)


def _expanded(plan: Plan, wide: Widths, more_hidden: float) -> tuple[Part, ...]:
    step, largest = plan.step, largest_quantized(plan)
    each = step.peak_mlp_dequantise * wide.intermediate
    each += (step.peak_hidden_dequantise + more_hidden) * wide.hidden
    text = f"{plan.tokens:,} tokens x {each:,.0f} B in the backward pass of a layer"
    size = step.dequantised * largest
    return (
        Part("temporaries", plan.tokens * each, text),
        Part("expanded weight", size, f"{largest:,} x {step.dequantised} B: one weight in 16 bits"),
    )


def _eager_backward(plan: Plan, wide: Widths) -> Part:
    scores = plan.step.peak_scores * plan.architecture.heads * plan.length
    each = 8 * wide.hidden + 4 * wide.query + 4 * wide.key + scores
    if wide.query != wide.key:
        each += 4 * (wide.query - wide.key)
    text = f"{plan.tokens:,} tokens x {each:,.0f} B: the scores of all pairs of tokens"
    return Part("attention scores", plan.tokens * each, text)


def _loss(plan: Plan) -> tuple[Part, ...]:
    step, architecture, tokens = plan.step, plan.architecture, plan.tokens
    hidden = tokens * architecture.hidden_size * step.loss_hidden
    entries = tokens * architecture.vocab_size
    if plan.loss == "logits":
        text = f"{tokens:,} tokens x {architecture.vocab_size:,} words x {step.logits:g} B"
        hidden = tokens * architecture.hidden_size * step.loss_hidden / 2
        parts = [Part("logits", entries * step.logits, text)]
    else:
        tile = min(step.tile_bytes, 2.0 * entries, step.tile_bytes * tokens / step.tile_tokens)
        parts = [Part("logits", tile, "one tile at a time, at most 256 MiB")]
    parts.append(Part("gradient of the last hidden state", hidden, "float32, and its copies"))
    if plan.trains_base or plan.trains_head:
        size = step.head_gradient * architecture.vocab_size * architecture.hidden_size
        parts.append(Part("gradient of the head", size, "float32, and a 16-bit copy"))
    return tuple(parts)


def _gradients(held: Weights, share: float, what: str) -> Part:
    return Part("gradients", held.gradients * share, what)


def _head_gradient(plan: Plan) -> tuple[Part, ...]:
    if not plan.trains_base:
        return ()
    size = 2.0 * plan.architecture.vocab_size * plan.architecture.hidden_size
    return (Part("gradient of the head", size, "there before the layers' own"),)


def _head_twice(plan: Plan) -> tuple[Part, ...]:
    if not plan.trains_base:
        return ()
    if not plan.architecture.tied_embeddings:
        return ()
    each = 2.0 * plan.adapter_bytes
    size = each * plan.architecture.vocab_size * plan.architecture.hidden_size
    return (Part("gradient of the embedding", size, "and its sum with the head's"),)
