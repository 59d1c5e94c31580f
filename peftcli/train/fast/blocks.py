"""The fused parts of a decoder layer, one autograd function each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcli.train.fast import ops
from peftcli.train.fast.again import again, unread
from peftcli.train.fast.linear import (
    Norm,
    backward_factors,
    backward_low,
    backward_normed,
    forward,
    forward_in_place,
    normed,
    room_for_output,
)
from peftcli.train.fast.lora import Group

FEWEST, MOST = 1024, 4096
"""Tokens that a `lean` MLP takes at a time: half of all, but no fewer, for products of few rows are
slow, and no more."""


@dataclass(frozen=True)
class Heads:
    """Norm, projections, head norms (Qwen3) and rotation that make queries, keys and values."""

    norm: Norm
    group: Group
    query_norm: Norm | None
    key_norm: Norm | None
    width: int
    sizes: list[int]
    """Outputs that are queries, keys and values, whether of one linear each or of one for all."""

    def split(self, y: Tensor) -> list[Tensor]:
        """(tokens x all outputs) -> views (tokens x heads x width) of queries, keys and values."""
        return [part.unflatten(-1, (-1, self.width)) for part in y.split(self.sizes, -1)]

    def norms(self) -> list[Norm]:
        """Head norms of queries and keys: both, or none."""
        if self.query_norm is None or self.key_norm is None:
            return []
        return [self.query_norm, self.key_norm]


class QueryKeyValue(torch.autograd.Function):
    """(tokens x hidden) -> rotated queries and keys, values: (tokens x heads x width); and `x`.

    What uses the stream later takes it from here, so that its gradient arrives with the others and
    is added where the norm's is made.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Heads, cos: Tensor, sin: Tensor, *_: Any) -> Any:
        wide, rstd = normed(heads.group, x, heads.norm)
        y, low = forward_in_place(heads.group, wide)
        q, k, v = heads.split(y)
        ctx.heads = heads
        norms = heads.norms()
        if norms:
            out = [part.new_empty(part.shape) for part in (q, k)]
            weights, epsilons = [n.weight for n in norms], [n.epsilon for n in norms]
            scales = ops.rope_normed([q, k], weights, epsilons, cos, sin, out)
            ctx.save_for_backward(x, low, rstd, cos, sin, y, *scales)
            return *out, v, x
        ctx.save_for_backward(x, low, rstd, cos, sin)
        ops.rope([q, k], cos, sin, 1, [q, k])
        return q, k, v, x

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, skip: Tensor) -> Any:
        x, low, rstd, cos, sin, *kept = ctx.saved_tensors
        heads: Heads = ctx.heads
        room = room_for_output(heads.group, x)
        parts = heads.split(room[:, : heads.group.weights.outputs])
        _rotate_back(heads, [dq, dk, dv], cos, sin, kept, parts)
        dx, found = backward_normed(
            heads.group, room, room, x, low, heads.norm, rstd, skip, ctx.needs_input_grad[0]
        )
        return dx, None, None, None, *found


def _rotate_back(
    heads: Heads, grads: list[Tensor], cos: Tensor, sin: Tensor, kept: list[Tensor], out: Any
) -> None:
    """Gradients of the projections' outputs, which head norms have kept with 1/rms, into `out`."""
    grads = [_whole_heads(grad) for grad in grads]
    if not kept:
        return ops.rope(grads, cos, sin, -1, out)
    y, *scales = kept
    weights = [norm.weight for norm in heads.norms()]
    raw = heads.split(y)[:2]
    return ops.rope_normed_backward(grads, raw, weights, scales, cos, sin, out)


class Output(torch.autograd.Function):
    """Output projection of the attention, added to `x` if there is one: (tokens x hidden)."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, x: Tensor | None, group: Group, *_: Any) -> Tensor:
        y, low = forward(group, mixed, x)
        ctx.group, ctx.adds = group, x is not None
        ctx.save_for_backward(mixed if low is not None else None, low)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        mixed, low = ctx.saved_tensors
        dy = dy.contiguous()
        dlow = backward_low(ctx.group, dy)
        dmixed = ctx.group.weights.backward(dy, dlow)
        a_grads = None if dlow is None else ops.factor_gradient(dlow, mixed)
        found = backward_factors(ctx.group, dy, low, a_grads)
        return dmixed, dy if ctx.adds else None, None, *found


class GatedMlp(torch.autograd.Function):
    """norm -> silu(gate) * up -> down, added to its input if `adds`: (tokens x hidden) -> the same.

    Keeps the input, gate and up; the product of the two is made again in the backward pass. A
    `lean` one has that product, and its gradient, for a part of the tokens at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Norm,
        gate_up: Group,
        down: Group,
        adds: bool,
        lean: bool,
        *_: Any,
    ) -> Tensor:
        wide, rstd = normed(gate_up, x, norm)
        room = room_for_output(gate_up, x)
        both, low = forward_in_place(gate_up, wide, room)
        del wide
        ctx.norm, ctx.gate_up, ctx.down, ctx.adds, ctx.lean = norm, gate_up, down, adds, lean
        most = _most(len(x), lean, beside=again())
        if adds and again():  # an adapter would read the output
            y, down_low = unread(x), _low_of_product(down, both, most)
        else:
            y, down_low = _down(down, both, x if adds else None, most)
        ctx.save_for_backward(x, rstd, room, low, down_low)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, rstd, room, low, down_low = ctx.saved_tensors
        dy = dy.contiguous()
        wide, a_grads = _backward_of_product(ctx.gate_up, ctx.down, dy, room, ctx.lean)
        down_found = backward_factors(ctx.down, dy, down_low, a_grads)
        skip = dy if ctx.adds else None
        dx, found = backward_normed(
            ctx.gate_up, room, wide, x, low, ctx.norm, rstd, skip, ctx.needs_input_grad[0]
        )
        return dx, None, None, None, None, None, *found, *down_found


def _down(down: Group, both: Tensor, add: Tensor | None, most: int) -> tuple[Tensor, Tensor | None]:
    """The down projection of h = silu(gate) * up, plus `add`; and h A' (None without adapters)."""
    parts = _parts(len(both), most)
    if len(parts) == 1:
        return forward_in_place(down, down.weights.gated(both), add=add)
    down = down.held()
    y = both.new_empty(len(both), down.weights.outputs)
    lows: list[Tensor | None] = []
    for rows in parts:
        wide = down.weights.gated(both[rows])
        added = None if add is None else add[rows]
        lows.append(forward_in_place(down, wide, y[rows], added)[1])
        del wide  # before the next part is made
    return y, _joined(lows)


def _low_of_product(down: Group, both: Tensor, most: int) -> Tensor | None:
    """h A' of h = silu(gate) * up, which the backward pass of the down projection reads."""
    if not down.columns:
        return None
    weights = down.weights
    return _joined([weights.low(weights.gated(both[x])) for x in _parts(len(both), most)])


def _joined(lows: list[Tensor | None]) -> Tensor | None:
    found = [low for low in lows if low is not None]
    return torch.cat(found) if found else None


def _backward_of_product(
    gate_up: Group, down: Group, dy: Tensor, room: Tensor, lean: bool
) -> tuple[Any, Tensor | None]:
    """Turns gate and up in `room` into their gradients; these in the form of the weights.

    The gradient of the down projection's A matrices comes second.
    """
    dlow = backward_low(down, dy)
    parts = _parts(len(dy), _most(len(dy), lean and gate_up.weights.in_room))
    if len(parts) > 1:
        down = down.held()
    wide, total = None, None
    for rows in parts:  # the factors' share of dproduct is added later
        dproduct = down.weights.backward(dy[rows], None)
        wide, a_grads = gate_up.weights.gated_backward(
            dproduct, room[rows], None if dlow is None else dlow[rows], down.weights.shadow_a
        )
        del dproduct
        total = a_grads if total is None or a_grads is None else total.add_(a_grads)
    return wide if len(parts) == 1 else room, total


def _most(tokens: int, lean: bool, *, beside: bool = True) -> int:
    """Tokens at a time; half of them matters `beside` what the layer keeps to go backward."""
    if not lean:
        return tokens
    return max(FEWEST, min(-(-tokens // 2), MOST)) if beside else MOST


def _parts(tokens: int, most: int) -> list[slice]:
    """All tokens, so many at a time."""
    return [slice(start, start + most) for start in range(0, tokens, most)]


class NormRows(torch.autograd.Function):
    """RMS norm over the last dimension, with a frozen weight; any shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        y, rstd = _each(x, norm)
        ctx.norm = norm
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, rstd = ctx.saved_tensors
        return _each_backward(dy.clone(), x, ctx.norm, rstd), None


def _each(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(flat)
    rstd = ops.rms_norm(flat, norm.weight, norm.epsilon, y)
    return y.view(x.shape), rstd


def _each_backward(dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    grad = dy.reshape(flat.shape).contiguous()
    return ops.rms_norm_backward(grad, flat, norm.weight, rstd).view(x.shape)


def _whole_heads(x: Tensor) -> Tensor:
    """Heads of a token one after the other, as the rotation reads them."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
