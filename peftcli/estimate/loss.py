"""What the loss holds beside the activations."""

from __future__ import annotations

from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan


def loss_parts(plan: Plan) -> tuple[Part, ...]:
    """Logits, the gradient of the last hidden state, and a trained head's own gradient."""
    step, architecture, tokens = plan.step, plan.architecture, plan.tokens
    hidden = tokens * architecture.hidden_size * step.loss_hidden
    entries = tokens * architecture.vocab_size
    if plan.loss == "logits":
        text = f"{tokens:,} tokens x {architecture.vocab_size:,} words x {step.logits:g} B"
        hidden = tokens * architecture.hidden_size * step.loss_hidden / 2
        parts = [Part("logits", entries * step.logits, text)]
    else:
        tile = min(step.tile_bytes, 2.0 * entries, step.tile_bytes * tokens / step.tile_tokens)
        text = f"one tile at a time, at most {step.tile_bytes / 2**20:.0f} MiB"
        parts = [Part("logits", tile, text)]
    parts.append(Part("gradient of the last hidden state", hidden, "float32, and its copies"))
    if plan.trains_base or plan.trains_head:
        size = step.head_gradient * architecture.vocab_size * architecture.hidden_size
        parts.append(Part("gradient of the head", size, "float32, and a 16-bit copy"))
    return tuple(parts)
