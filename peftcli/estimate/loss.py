"""What the loss holds beside the activations."""

from __future__ import annotations

from peftcli.estimate.groups import rounded
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
        parts = [logits_tile(plan)]
    parts.append(Part("gradient of the last hidden state", hidden, "float32, and its copies"))
    if plan.trains_base and plan.base_bytes == 4:
        size = 4.0 * architecture.vocab_size * architecture.hidden_size
        parts += [Part("gradient of the head", size, "float32"), head_chunks(plan)]
    elif plan.trains_base or plan.trains_head:
        size = step.head_gradient * architecture.vocab_size * architecture.hidden_size
        parts.append(Part("gradient of the head", size, "float32, and a 16-bit copy"))
    return tuple(parts)


def logits_tile(plan: Plan) -> Part:
    """The logits that a chunked loss holds at a time."""
    step, tokens = plan.step, plan.tokens
    word = 2.0 * plan.architecture.vocab_size
    tile = min(word * tokens, step.tile_bytes, step.tile_bytes * tokens / step.tile_tokens)
    if step.tile_parts:
        most = max(64, step.tile_bytes // word // 64 * 64)
        tile = word * min(tokens, most, max(512, rounded(-(-tokens // step.tile_parts), 64)))
    return Part("logits", tile, f"one tile at a time, at most {step.tile_bytes / 2**20:.0f} MiB")


def head_chunks(plan: Plan) -> Part:
    """TRL's chunked loss on a float32 head: one chunk of it in 16 bits, and the next one."""
    rows = min(plan.step.head_chunk, plan.architecture.vocab_size)
    size = 2 * 2.0 * rows * plan.architecture.hidden_size
    return Part("16-bit chunks of the head", size, f"2 x {rows:,} words x 2 B")
