"""What the backward pass of one layer needs beside what is kept, moment by moment."""

from __future__ import annotations

from peftcli.architecture.config import Linear
from peftcli.estimate.layer import attention_masks, kept_after, kept_tensors, softcap
from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan
from peftcli.estimate.weights import largest_expanded
from peftcli.estimate.widths import WRITERS, Widths


def backward_moments(plan: Plan, wide: Widths, *, again: bool) -> dict[str, tuple[Part, ...]]:
    """Temporaries of the backward pass of the widest layer, by moment; `again` if it runs twice."""
    unread = plan.step.peak_unread if again else 0.0
    found = {
        "backward of the feed-forward block": (_mlp(plan, wide, unread),),
        "backward of the up-projections": expanded(plan, wide, -unread),
    }
    if again and plan.step.peak_adapter:
        each = plan.step.peak_adapter * wide.hidden + 4 * plan.bottleneck
        text = f"{plan.tokens:,} tokens x {each:,.0f} B: what goes in and out, and its gradients"
        found["backward of the last adapter"] = (Part("temporaries", plan.tokens * each, text),)
    return found


def first_block(plan: Plan, wide: Widths) -> tuple[Part, ...]:
    """Temporaries of the first layer's feed-forward block going backward: those of the last one
    without the output, which nobody has any more."""
    return (_mlp(plan, wide, plan.step.stream),)


def _mlp(plan: Plan, wide: Widths, unread: float) -> Part:
    step = plan.step
    share = mlp_tokens(plan) / plan.tokens
    inner, outer = _fullest(plan)
    each = share * inner * wide.intermediate + (outer - unread) * wide.hidden
    if not plan.checkpointing:
        each = max(0.0, each - step.peak_counted * wide.intermediate)
    text = f"{plan.tokens:,} tokens x {each:,.0f} B in the backward pass of the last layer"
    return Part("temporaries", plan.tokens * each, text)


def _fullest(plan: Plan) -> tuple[float, float]:
    """Bytes per intermediate and per hidden element where a feed-forward block is fullest.

    Where LoRA leaves out its last linear, that is when its activation goes backward, whatever the
    base is held in: nothing of the adapters is there yet.
    """
    step = plan.step
    mlp = {x.suffix for x in plan.targets if x.kind == "mlp"}
    joined = "gate_up_proj" in mlp
    as_adapted = step.in_groups or bool(plan.bottleneck) or plan.trains_base
    if as_adapted or not plan.checkpointing or mlp & set(WRITERS) or (mlp and plan.magnitudes):
        return step.peak_mlp, step.peak_hidden + step.peak_joined * joined
    below = step.peak_below_joined if joined else step.peak_below
    return step.peak_unadapted, below if mlp else step.peak_frozen


def mlp_tokens(plan: Plan) -> int:
    """Tokens whose inner activations an MLP has at a time."""
    if not plan.checkpointing or plan.step.mlp_parts is None:
        return plan.tokens
    fewest, most = plan.step.mlp_parts
    return min(plan.tokens, max(fewest, min(-(-plan.tokens // 2), most)))


def expanded(plan: Plan, wide: Widths, more_hidden: float) -> tuple[Part, ...]:
    """One 4-bit weight in 16 bits, and what is there beside it."""
    step, largest = plan.step, largest_expanded(plan)
    each = step.peak_mlp_dequantise * wide.intermediate
    each += (step.peak_hidden_dequantise + more_hidden) * wide.hidden
    text = f"{plan.tokens:,} tokens x {each:,.0f} B in the backward pass of a layer"
    size = step.dequantised * largest
    return (
        Part("temporaries", plan.tokens * each, text),
        Part("expanded weight", size, f"{largest:,} x {step.dequantised} B: one weight in 16 bits"),
    )


def attention_backward(plan: Plan, wide: Widths) -> tuple[Part, ...]:
    """The score matrices of the eager kernel's backward pass, in a layer that is computed again."""
    if plan.kernel != "eager" or not plan.checkpointing:
        return ()
    scores = plan.step.peak_scores + softcap(plan)
    scores *= plan.architecture.heads * plan.length
    each = 8 * wide.hidden + 4 * wide.query + 4 * wide.key + scores
    if plan.magnitudes:  # the outputs that DoRA scales
        read = [x for x in plan.targets if x.kind == "attention" and x.suffix not in WRITERS]
        each += plan.step.kept_scaled * sum(x.outputs for x in read)
    if wide.query != wide.key:
        each += 4 * (wide.query - wide.key)
    text = f"{plan.tokens:,} tokens x {each:,.0f} B: the scores of all pairs of tokens"
    return (Part("attention scores", plan.tokens * each, text),)


def first_attention(plan: Plan, wide: Widths) -> tuple[Part, ...]:
    """The same of the first layer where the base is trained, with the masks, and what the weights
    and norms of its attention keep."""
    scores = attention_backward(plan, wide)
    if not scores:
        return ()
    kept = kept_tensors(plan, wide)
    names = ("inputs of the norms", "inputs of adapters and trained norms")
    each = sum(kept[name] for name in names) / 2  # the other half is the feed-forward block's
    text = f"{plan.tokens:,} tokens x {each:,.0f} B: inputs of its norms and weights"
    masks = Part("masks", attention_masks(plan), "of all pairs of tokens")
    return (*scores, masks, Part("recomputed layer", plan.tokens * each, text))


def magnitudes(plan: Plan, wide: Widths) -> tuple[Part, ...]:
    """What PEFT's DoRA holds while it weighs the rows of one weight, where that is most.

    It sends an identity matrix through the update, scales it, adds it to the weight, and takes the
    length of each row; two of these matrices stay until the outputs are scaled and summed.
    """
    sizes = [_weighed(plan, wide, x) for x in plan.targets if x.kind in ("mlp", "attention")]
    text = "an identity matrix, the update multiplied out, and its sum with the weight"
    return (Part("the update as a whole matrix", max(sizes, default=0.0), text),)


def _weighed(plan: Plan, wide: Widths, target: Linear) -> float:
    """Bytes beside all that the layer will have kept, while it computes this target's output."""
    step, writes = plan.step, target.suffix in WRITERS
    half = 0 if step.float32_outputs else 2  # the 16-bit original of what is cast
    around = 4 if writes else half  # the stream, and what its norm gives
    around += (8 + half) * plan.checkpointing  # its gradients
    tokens = (4 + half) * target.inputs + around * wide.hidden - kept_after(plan, wide, target)
    if plan.dropout:  # the input without what was dropped, and the base's output of it all
        tokens += 4 * (target.inputs + target.outputs)
    own = step.kept_input * target.inputs + 2 * target.outputs  # not kept yet in the matrices
    identity, size = float(target.inputs**2), target.weights
    scaled = 4 + half if writes and plan.checkpointing else 12  # nothing more is computed again
    early = max(6 * identity + 2 * size, 2 * identity + 16 * size)
    late = 2 * identity + 8 * size
    return max(
        early + plan.tokens * (tokens - own),
        late + plan.tokens * (tokens + scaled * target.outputs),
    )
