"""The fused parts of a decoder layer, one autograd function each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcli.train.fast import ops
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


@dataclass(frozen=True)
class Heads:
    """Norm, projections, head norms (Qwen3) and rotation that make queries, keys and values."""

    norm: Norm
    group: Group
    query_norm: Norm | None
    key_norm: Norm | None
    width: int

    def split(self, y: Tensor) -> list[Tensor]:
        """(tokens x all outputs) -> views (tokens x heads x width) of queries, keys and values."""
        return [part.unflatten(-1, (-1, self.width)) for part in y.split(self.group.sizes, -1)]


class QueryKeyValue(torch.autograd.Function):
    """(tokens x hidden) -> rotated queries and keys, and values: (tokens x heads x width) each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Heads, cos: Tensor, sin: Tensor, *_: Any) -> Any:
        wide, rstd = normed(heads.group, x, heads.norm)
        y, low = forward_in_place(heads.group, wide)
        q, k, v = heads.split(y)
        ctx.heads = heads
        scales: list[Tensor | None] = [None, None]
        if heads.query_norm is not None and heads.key_norm is not None:
            (q, scales[0]), (k, scales[1]) = _each(q, heads.query_norm), _each(k, heads.key_norm)
        ctx.save_for_backward(x, low, rstd, cos, sin, y if scales[0] is not None else None, *scales)
        ops.rope(q, cos, sin, 1, q)
        ops.rope(k, cos, sin, 1, k)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        x, low, rstd, cos, sin, y, *scales = ctx.saved_tensors
        heads: Heads = ctx.heads
        room = room_for_output(heads.group, x)
        parts = heads.split(room[:, : heads.group.weights.outputs])
        ops.rope(_whole_heads(dq), cos, sin, -1, parts[0])
        ops.rope(_whole_heads(dk), cos, sin, -1, parts[1])
        if y is not None:
            norms: Any = (heads.query_norm, heads.key_norm)
            for part, raw, norm, scale in zip(parts, heads.split(y), norms, scales, strict=False):
                part.copy_(_each_backward(part, raw, norm, scale))
        parts[2].copy_(dv)
        dx, found = backward_normed(
            heads.group, room, room, x, low, heads.norm, rstd, None, ctx.needs_input_grad[0]
        )
        return dx, None, None, None, *found


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

    Keeps the input, gate and up; the product of the two is made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm, gate_up: Group, down: Group, adds: bool, *_: Any
    ) -> Tensor:
        wide, rstd = normed(gate_up, x, norm)
        room = room_for_output(gate_up, x)
        both, low = forward_in_place(gate_up, wide, room)
        del wide
        wide = down.weights.gated(both)
        y, down_low = forward_in_place(down, wide, add=x if adds else None)
        ctx.norm, ctx.gate_up, ctx.down, ctx.adds = norm, gate_up, down, adds
        ctx.save_for_backward(x, rstd, room, low, down_low)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, rstd, room, low, down_low = ctx.saved_tensors
        dy = dy.contiguous()
        dlow = backward_low(ctx.down, dy)
        dproduct = ctx.down.weights.backward(dy, None)  # the factors' share is added later
        wide, a_grads = ctx.gate_up.weights.gated_backward(
            dproduct, room, dlow, ctx.down.weights.shadow_a
        )
        del dproduct
        down_found = backward_factors(ctx.down, dy, down_low, a_grads)
        skip = dy if ctx.adds else None
        dx, found = backward_normed(
            ctx.gate_up, room, wide, x, low, ctx.norm, rstd, skip, ctx.needs_input_grad[0]
        )
        return dx, None, None, None, None, *found, *down_found


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
