"""Bytes that one layer keeps for its backward pass, per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from peftcli.architecture.config import Linear
from peftcli.estimate.groups import padding
from peftcli.estimate.plan import Plan
from peftcli.estimate.widths import (
    WRITERS,
    Widths,
    has_query_norms,
    joins_queries,
    layer_kinds,
    stream_norms,
)

Kinds = tuple[tuple[Plan, Widths], ...]
"""Kinds of layers, each with the plan of its own adapters only."""


def first_kept(plan: Plan) -> int:
    """The lowest layer that runs backward; what lies below it keeps nothing.

    Plain checkpointing makes the first layer's input need a gradient, and so every layer.
    """
    everywhere = plan.trains_base or plan.trains_embeddings
    if everywhere or (plan.checkpointing and not plan.step.in_groups):
        return 0
    tuned = {i for x in plan.targets for i in x.layers}
    if plan.bottleneck:
        tuned |= set(range(plan.architecture.layers) if plan.layers is None else plan.layers)
    return min(tuned, default=0)


@lru_cache(1024)
def kept_layers(plan: Plan) -> Kinds:
    """The layers that run backward, by kind and by the adapters they have."""
    first, homes = first_kept(plan), _homes(plan)
    return tuple(
        kind
        for widths in layer_kinds(plan.architecture)
        for kind in _by_adapters(plan, widths, [i for i in widths.indices if i >= first], homes)
    )


STAY = 2
"""Layers whose inputs are on the GPU at a time, where they wait in host memory otherwise."""


def offloaded_layers(plan: Plan) -> int:
    """How many layers' inputs are in host memory when the forward pass has ended."""
    if not plan.offload:
        return 0
    return max(0, sum(kind.layers for _, kind in kept_layers(plan)) - STAY)


Homes = list[tuple[frozenset[int], tuple[str, ...]]]


def _homes(plan: Plan) -> Homes:
    """Sets of layers, each with the names of the targets that it has."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name, layers in {x.name: x.layers for x in plan.targets}.items():
        found.setdefault(layers, []).append(name)
    return [(frozenset(layers), tuple(names)) for layers, names in found.items()]


def _by_adapters(
    plan: Plan, widths: Widths, layers: list[int], homes: Homes
) -> Iterator[tuple[Plan, Widths]]:
    groups: dict[tuple[tuple[str, ...], bool], list[int]] = {}
    for i in layers:
        names = tuple(name for home, names in homes if i in home for name in names)
        site = plan.layers is None or i in plan.layers
        groups.setdefault((names, site), []).append(i)
    for (names, site), found in groups.items():
        targets = tuple(x for x in plan.targets if x.name in names)
        own = replace(plan, targets=targets, bottleneck=plan.bottleneck * site)
        yield own, replace(widths, indices=tuple(found))


def kept_per_token(plan: Plan, widths: Widths) -> float:
    """Bytes that a layer without checkpointing keeps, for each token of the micro-batch."""
    return sum(kept_tensors(plan, widths).values())


def kept_tensors(plan: Plan, widths: Widths) -> dict[str, float]:
    """What a layer keeps from its forward pass to its backward pass, in bytes per token by name.

    The one description of a layer's activations: all of memory and time follows from it.
    """
    step, architecture = plan.step, plan.architecture
    norms = stream_norms(architecture)
    gate = step.kept_gated if widths.gated else step.kept_ungated
    if architecture.unfused_gelu:
        gate += step.kept_unfused
    kept = {
        "inputs of the norms": norms * (step.kept_norm * widths.hidden + 4),
        "queries and attention output": query_kept(plan, widths),
        "keys and values": step.kept_key * widths.key,
        "feed-forward block": gate * widths.intermediate + 2.0 * padding(plan),
        "inputs of adapters and trained norms": step.kept_other * widths.hidden,
        "inputs of adapted linears": targets_kept(plan, widths),
        "repeated keys, mask, scores": attention_kept(plan, widths),
    }
    if has_query_norms(architecture):
        both = step.kept_query_norm * (widths.query + widths.key)
        kept["inputs of the query norms"] = both + 4 * (architecture.heads + architecture.kv_heads)
    if joins_queries(architecture) and not step.in_groups:  # values are a view of all, which stays
        kept["queries and keys before rotation"] = 2.0 * (widths.query + widths.key)
    if plan.trains_base:
        kept["input of the down-projection"] = 2.0 * widths.intermediate
    if plan.bottleneck:
        each = 2.0 * plan.bottleneck + step.kept_site * widths.hidden
        kept["bottlenecks"] = plan.sites * each
    return kept


def query_kept(plan: Plan, widths: Widths) -> float:
    """Queries and what comes out of attention, half and half, with the sums of the scores.

    The eager kernel's output is read by nobody but the output projection: it stays where that keeps
    its input itself, and not a copy.
    """
    step = plan.step
    if plan.kernel != "eager":
        return step.kept_query * widths.query + 4 * plan.architecture.heads
    adapted = any(x.kind == "attention" and x.suffix in WRITERS for x in plan.targets)
    shared = step.inputs_shared or (step.float32_outputs and not plan.dropout)
    stays = plan.trains_base or (shared and adapted)
    return step.kept_query * widths.query / (1 if stays else 2)


def before_the_first_adapter(plan: Plan, widths: Widths) -> float:
    """Of `kept_per_token`, what the first layer does not keep: its attention, if all that is
    trained comes after it. A plain step casts the stream so that it needs a gradient anyway.
    Where DoRA leaves its outputs in float32, the first layer still reads 16 bits."""
    if plan.step.float32_outputs and not plan.dropout:
        reads = [x for x in plan.targets if x.kind == "attention" and x.suffix not in WRITERS]
        return 4.0 * widths.hidden + 2.0 * sum(x.outputs for x in reads)
    if not (plan.step.in_groups and plan.bottleneck):
        return 0.0
    kept = kept_tensors(plan, widths)
    names = ("queries and attention output", "keys and values", "inputs of the query norms")
    norm = kept["inputs of the norms"] / stream_norms(plan.architecture)
    return norm + sum(kept.get(name, 0.0) for name in names)


def attention_kept(plan: Plan, widths: Widths) -> float:
    """What other kernels add to flash: repeated keys, a mask, the whole score matrix."""
    repeated = 4 * (widths.query - widths.key)
    if plan.kernel == "efficient":
        return repeated
    if plan.kernel == "masked":
        return repeated + 2 * plan.length
    if plan.kernel == "eager":
        return repeated + scores_kept(plan)
    return 0.0


def scores_kept(plan: Plan) -> float:
    """Of that, the eager kernel's scores: every pair of tokens, inside a window or not."""
    if plan.kernel != "eager":
        return 0.0
    return (plan.step.kept_scores + softcap(plan)) * plan.architecture.heads * plan.length


def attention_masks(plan: Plan) -> float:
    """Bytes of the eager kernel's masks, one of each kind of layer, over all pairs of tokens."""
    if plan.kernel != "eager":
        return 0.0
    kinds = 2 if plan.architecture.sliding_window else 1
    return 2.0 * kinds * plan.tokens * plan.length


def softcap(plan: Plan) -> float:
    """Bytes per head and pair of tokens that a cap on the scores keeps."""
    return plan.step.kept_softcap if plan.architecture.attention_softcap else 0.0


def targets_kept(plan: Plan, widths: Widths) -> float:
    """Inputs of the adapted linears of one layer, and what enters their second matrix.

    DoRA scales the outputs of base and update by trained numbers, and so keeps both.
    """
    step = plan.step
    total, seen = 0.0, set()
    for target in plan.targets:
        if target.kind in ("vision", "head") or (target.kind == "mlp" and not widths.intermediate):
            continue
        writes = target.suffix in WRITERS
        total += step.kept_rank * plan.rank_of(target)
        total += step.kept_scaled * target.outputs if plan.magnitudes else 0.0
        each = step.kept_input + (step.kept_mask if plan.dropout else 0)
        if step.float32_outputs and plan.dropout:
            total -= 2 * target.outputs  # the base's output is made again, in 16 bits
        elif step.float32_outputs and writes and target.kind == "attention":
            total -= 2 * target.outputs + step.kept_input * target.inputs  # its input has 16 bits
        if not step.inputs_shared:
            total += each * target.inputs
        elif not (writes and target.kind == "attention"):  # the attention output is kept already
            if (target.kind, writes) not in seen:
                total += step.kept_input * target.inputs
            seen.add((target.kind, writes))
    return total


def kept_after(plan: Plan, widths: Widths, target: Linear) -> float:
    """Of `kept_per_token`, what the layer keeps only after this target has its output."""
    writes = target.suffix in WRITERS
    if target.kind == "mlp":
        if writes:
            return 0.0
        later = [x for x in plan.targets if x.kind == "mlp" and x.suffix in WRITERS]
        output = plan.step.kept_gated / 3 * widths.intermediate
        return output + targets_kept(replace(plan, targets=tuple(later)), widths)
    kept = kept_tensors(plan, widths)
    later = [x for x in plan.targets if x.kind == "mlp"]
    total = kept["feed-forward block"] + kept["inputs of the norms"] / 2
    if not writes:
        later += [x for x in plan.targets if x.kind == "attention" and x.suffix in WRITERS]
        total += kept["queries and attention output"] + kept["keys and values"]
    return total + targets_kept(replace(plan, targets=tuple(later)), widths)
