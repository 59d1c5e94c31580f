"""Bytes that one layer keeps for its backward pass, per token."""

from __future__ import annotations

from dataclasses import dataclass

from peftcli.architecture.config import Architecture, Linear
from peftcli.estimate.plan import Plan

WRITERS = (  # linears whose output goes to the stream, by the last part of their names
    *("o_proj", "down_proj", "out_proj", "dense", "c_proj", "wo", "w2", "fc2", "fc_out"),
    *("dense_4h_to_h", "project_out"),
)


@dataclass(frozen=True)
class Widths:
    """Widths of a layer: the stream, queries, keys, and the intermediate of one kind of layer."""

    hidden: int
    query: int
    key: int
    intermediate: int
    gated: bool
    layers: int
    """How many layers are of this kind."""


def layer_kinds(architecture: Architecture) -> list[Widths]:
    """The kinds of layers by their feed-forward block: dense, and with experts."""
    dense = sorted({i for x in _of_text(architecture) if x.kind == "mlp" for i in x.layers})
    sparse = sorted({i for x in architecture.experts for i in x.layers})
    dense = [i for i in dense if i not in set(sparse)]
    kinds = []
    if dense or not sparse:
        kinds.append(_widths(architecture, architecture.intermediate, len(dense)))
    if sparse:
        kinds.append(_widths(architecture, _routed_width(architecture), len(sparse)))
    idle = architecture.layers - len(dense) - len(sparse)
    if idle > 0:  # attention or Mamba alone
        kinds.append(_widths(architecture, 0, idle))
    return [kind for kind in kinds if kind.layers]


def _widths(architecture: Architecture, intermediate: int, layers: int) -> Widths:
    ups = [x for x in _of_text(architecture) if x.kind == "mlp" and x.suffix not in WRITERS]
    names = {x.suffix for x in ups} | {x.name.rsplit(".", 1)[-1] for x in architecture.experts}
    gated = bool(names & {"gate_proj", "gate_up_proj", "w1"})
    return Widths(
        hidden=architecture.hidden_size,
        query=architecture.heads * architecture.head_size,
        key=architecture.kv_heads * architecture.head_size,
        intermediate=intermediate,
        gated=gated,
        layers=layers,
    )


def _routed_width(architecture: Architecture) -> int:
    """Intermediate width that a token meets: its experts' and the shared one's."""
    downs = [x for x in architecture.experts if x.name.endswith("down_proj")]
    routed = max((x.active * x.shape[-1] for x in downs if len(x.shape) > 1), default=0)
    if downs and downs[0].shape[-1] == architecture.hidden_size:  # stored as [in, out]
        routed = downs[0].active * downs[0].shape[0]
    shared = [x for x in _of_text(architecture) if "shared_expert" in x.name]
    return routed + max((x.inputs for x in shared if x.suffix in WRITERS), default=0)


def _of_text(architecture: Architecture) -> list[Linear]:
    return [x for x in architecture.linears if x.layers and x.kind != "vision"]


def kept_per_token(plan: Plan, widths: Widths) -> float:
    """Bytes that a layer without checkpointing keeps, for each token of the micro-batch."""
    step, architecture = plan.step, plan.architecture
    heads, kv_heads = architecture.heads, architecture.kv_heads
    norms = stream_norms(architecture)
    total = norms * (step.kept_norm * widths.hidden + 4) + 4 * heads
    total += step.kept_query * widths.query + step.kept_key * widths.key
    if has_query_norms(architecture):
        total += step.kept_query_norm * (widths.query + widths.key) + 4 * (heads + kv_heads)
    total += (step.kept_gated if widths.gated else step.kept_ungated) * widths.intermediate
    total += step.kept_other * widths.hidden
    if plan.trains_base:
        total += 2 * widths.intermediate
    if plan.bottleneck:
        total += 2 * plan.sites * plan.bottleneck
    return total + attention_kept(plan, widths) + targets_kept(plan, widths)


def attention_kept(plan: Plan, widths: Widths) -> float:
    """What a mask or the eager kernel adds: repeated keys, the mask, the whole score matrix."""
    heads = plan.architecture.heads
    repeated = 4 * (widths.query - widths.key)
    if plan.kernel == "masked":
        return repeated + 2 * plan.length
    if plan.kernel == "eager":
        return repeated + plan.step.kept_scores * heads * plan.length
    return 0.0


def targets_kept(plan: Plan, widths: Widths) -> float:
    """Inputs of the adapted linears of one layer, and what enters their second matrix."""
    step = plan.step
    total, seen = 0.0, set()
    for target in plan.targets:
        if target.kind in ("vision", "head") or (target.kind == "mlp" and not widths.intermediate):
            continue
        writes = target.suffix in WRITERS
        total += step.kept_rank * plan.rank
        each = step.kept_input + (step.kept_mask if plan.dropout else 0)
        if not step.inputs_shared:
            total += each * target.inputs
        elif not (writes and target.kind == "attention"):  # the attention output is kept already
            if (target.kind, writes) not in seen:
                total += step.kept_input * target.inputs
            seen.add((target.kind, writes))
    return total


def stream_norms(architecture: Architecture) -> int:
    """Norms of the stream's width in one layer."""
    width = (architecture.hidden_size,)
    found = [
        x
        for x in architecture.tensors
        if x.layers and x.shape == width and x.kind == "norm" and x.name.endswith("weight")
    ]
    text = [x for x in found if "vision" not in x.name]
    return -(-sum(len(x.layers) for x in text) // architecture.layers)


def has_query_norms(architecture: Architecture) -> bool:
    return any("self_attn.q_norm" in x.name for x in architecture.tensors)
