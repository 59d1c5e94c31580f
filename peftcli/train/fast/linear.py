"""Forward and backward products of a group of linears, frozen weights and LoRA factors together.

For each layer y = x W' + b + (x A') (s B)'. Only x A', which is as narrow as the rank, is kept for
the backward pass beside the input. Where the input is a norm's output, the input of the norm is
kept instead: dA = dz' norm(x) = ((dz / rms)' x) * weight, so the normed rows are never needed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcli.train.fast import ops
from peftcli.train.fast.lora import Group


@dataclass(frozen=True)
class Norm:
    """An RMS norm with a frozen weight, before the layers of a group."""

    weight: Tensor
    epsilon: float


def forward(group: Group, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """(tokens x in) -> the output of each layer (tokens x out), and x A' for the backward pass."""
    low = None if group.shadow_a is None else x @ group.shadow_a.T
    outputs = []
    for weight, bias, factor in zip(group.weights, group.biases, group.factors, strict=True):
        frozen = weight.get().T
        y = x @ frozen if bias is None else torch.addmm(bias, x, frozen)
        if factor is not None and low is not None:
            y.addmm_(low[:, factor.columns], factor.shadow_b.T)
        outputs.append(y)
    return outputs, low


def backward(
    group: Group,
    grads: list[Tensor],
    x: Tensor,
    low: Tensor | None,
    norm: tuple[Norm, Tensor] | None,
    needs_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradient of the group's input (None unless asked for), and of A and B of each layer.

    `x` is the group's input or, with `norm` (and its 1/rms), that norm's input.
    """
    dx: Tensor | None = None
    dlow = None if low is None else torch.empty_like(low)
    b_grads: list[Tensor | None] = []
    for weight, factor, dy in zip(group.weights, group.factors, grads, strict=True):
        if factor is not None and low is not None and dlow is not None:
            columns = factor.columns
            torch.mm(dy, factor.shadow_b, out=dlow[:, columns])
            b_grads.append((dy.T @ low[:, columns]).mul_(factor.scale))
        else:
            b_grads.append(None)
        if needs_input:
            frozen = weight.get()
            dx = dy @ frozen if dx is None else dx.addmm_(dy, frozen)
    if dlow is None or group.shadow_a is None:
        return dx, _interleave(group, None, b_grads)
    if dx is not None:
        dx.addmm_(dlow, group.shadow_a)
    if norm is None:
        return dx, _interleave(group, dlow.T @ x, b_grads)
    rms, rstd = norm
    a_grads = ((dlow * rstd[:, None]).to(x.dtype).T @ x).mul_(rms.weight)
    return dx, _interleave(group, a_grads, b_grads)


def _interleave(
    group: Group, a_grads: Tensor | None, b_grads: list[Tensor | None]
) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for factor, b_grad in zip(group.factors, b_grads, strict=True):
        has = factor is not None and a_grads is not None
        found += [a_grads[factor.columns] if has else None, b_grad]  # type: ignore[index, union-attr]
    return found


class NormRows(torch.autograd.Function):
    """RMS norm over the last dimension, with a frozen weight; any shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, rstd = ops.rms_norm(flat, norm.weight, norm.epsilon)
        ctx.norm = norm
        ctx.save_for_backward(flat, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        flat, rstd = ctx.saved_tensors
        grad = dy.reshape(flat.shape).contiguous()
        return ops.rms_norm_backward(grad, flat, ctx.norm.weight, rstd).view(dy.shape), None


class Project(torch.autograd.Function):
    """Norm, then the layers of a group: (tokens x in) -> a tuple of (tokens x out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, norm: Norm | None, *_: Any) -> Any:
        normed, rstd = (x, None) if norm is None else ops.rms_norm(x, norm.weight, norm.epsilon)
        outputs, low = forward(group, normed)
        ctx.group, ctx.norm = group, norm
        ctx.save_for_backward(x, low, rstd)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, low, rstd = ctx.saved_tensors
        norm = None if ctx.norm is None else (ctx.norm, rstd)
        needs_input = ctx.needs_input_grad[0]
        held = [grad.contiguous() for grad in grads]
        dx, found = backward(ctx.group, held, x, low, norm, needs_input)
        if dx is not None and norm is not None:
            dx = ops.rms_norm_backward(dx, x, ctx.norm.weight, rstd)
        return dx, None, None, *found


class GatedMlp(torch.autograd.Function):
    """norm -> silu(gate) * up -> down, added to its input: (tokens x hidden) -> the same.

    Keeps the input, gate and up; the product of the two is made again in the backward pass.
    Without `down` it returns the product itself, and adds nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm, wide: Group, down: Group | None, *_: Any
    ) -> Tensor:
        normed, rstd = ops.rms_norm(x, norm.weight, norm.epsilon)
        (gate, up), low = forward(wide, normed)
        del normed
        product = ops.swiglu(gate, up)
        ctx.norm, ctx.wide, ctx.down = norm, wide, down
        if down is None:
            ctx.save_for_backward(x, rstd, gate, up, low, None)
            return product
        (y,), down_low = forward(down, product)
        ctx.save_for_backward(x, rstd, gate, up, low, down_low)
        return y.add_(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, rstd, gate, up, low, down_low = ctx.saved_tensors
        dy = dy.contiguous()
        if ctx.down is None:
            skip, down_grads = None, []
            _, dgate, dup = ops.swiglu_backward(dy.clone(), gate, up)
        else:
            skip = dy
            dproduct = dy @ ctx.down.weights[0].get()
            dlow, factor = None, ctx.down.factors[0]
            if factor is not None:
                dlow = dy @ factor.shadow_b
                dproduct.addmm_(dlow, ctx.down.shadow_a)
            product, dgate, dup = ops.swiglu_backward(dproduct, gate, up)
            down_grads = [None, None]
            if factor is not None and dlow is not None:
                down_grads = [dlow.T @ product, (dy.T @ down_low).mul_(factor.scale)]
            del product, dproduct
        needs_input = ctx.needs_input_grad[0]
        dx, found = backward(ctx.wide, [dgate, dup], x, low, (ctx.norm, rstd), needs_input)
        del dgate, dup
        if dx is not None:
            dx = ops.rms_norm_backward(dx, x, ctx.norm.weight, rstd, skip)
        return dx, None, None, None, *found, *down_grads

