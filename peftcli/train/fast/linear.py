"""Forward and backward products of a group of linears, frozen weights and LoRA factors together.

y = [x | x A'] [W | s B]' + b is one product for all layers of a group. For the backward pass only
x A', which is as narrow as the ranks, is kept beside the input. Where the input is a norm's output,
the input of the norm is kept instead: dA = dz' norm(x) = ((dz / rms)' x) * weight, so the normed
rows are never needed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftcli.train.fast import ops
from peftcli.train.fast.lora import Group
from peftcli.train.fast.weights import aligned


@dataclass(frozen=True)
class Norm:
    """An RMS norm with a frozen weight, before the layers of a group."""

    weight: Tensor
    epsilon: float


def room_for_input(group: Group, x: Tensor) -> Tensor:
    """(tokens x inputs + columns of the update), in which the input takes the first columns."""
    return aligned(len(x), group.weights.inputs + group.columns, x.dtype, x.device)


def room_for_output(group: Group, x: Tensor) -> Tensor:
    """(tokens x outputs + columns of the update), in which the output takes the first columns."""
    return aligned(len(x), group.weights.outputs + group.columns, x.dtype, x.device)


def forward_in_place(
    group: Group, wide: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Outputs of all layers side by side, and x A' (None without adapters).

    `wide` comes from `room_for_input`, `out` from `room_for_output`.
    """
    weights, low = group.weights, None
    matrix = weights.matrix()[: weights.outputs].T
    if group.columns:
        low = wide[:, : weights.inputs] @ weights.shadow_a.T
        wide[:, weights.inputs :] = low
    if out is not None:
        out = out[:, : weights.outputs]
    if group.bias is None:
        return torch.mm(wide, matrix, out=out), low
    return torch.addmm(group.bias, wide, matrix, out=out), low


def forward(group: Group, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same for an input that lies somewhere else and would have to be copied."""
    weights = group.weights
    matrix = weights.matrix()[: weights.outputs, : weights.inputs].T
    y = x @ matrix if group.bias is None else torch.addmm(group.bias, x, matrix)
    if not group.columns:
        return y, None
    low = x @ weights.shadow_a.T
    return y.addmm_(low, weights.shadow_b.T), low


def backward_in_place(group: Group, wide: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and of x A'; `wide` holds the output's in `room_for_output`."""
    weights, dlow = group.weights, None
    matrix = weights.matrix()[:, : weights.inputs]
    if group.columns:
        dlow = wide[:, : weights.outputs] @ weights.shadow_b
        wide[:, weights.outputs :] = dlow
    return wide @ matrix, dlow


def backward_input(group: Group, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same where the output's gradient lies somewhere else."""
    weights = group.weights
    dx = dy @ weights.matrix()[: weights.outputs, : weights.inputs]
    if not group.columns:
        return dx, None
    dlow = dy @ weights.shadow_b
    return dx.addmm_(dlow, weights.shadow_a), dlow


def backward_factors(group: Group, dy: Tensor, low: Tensor, a_grads: Tensor) -> list[Tensor | None]:
    """Gradients of A and B of each layer; `a_grads` are those of all A, one below the other."""
    b_grads = dy.T @ low
    found: list[Tensor | None] = []
    for factor in group.factors:
        if factor is None:
            found += [None, None]
            continue
        b_grad = b_grads[factor.rows, factor.columns].mul_(factor.scale)
        found += [a_grads[factor.columns], b_grad]
    return found


def backward_normed(
    group: Group, wide: Tensor, x: Tensor, low: Tensor | None, norm: Norm, rstd: Tensor,
    skip: Tensor | None, needs_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Back through a group and the norm before it, whose input is `x`; `skip` is added.

    `wide` holds the gradient of the group's output in `room_for_output`.
    """
    dx = dlow = None
    dy = wide[:, : group.weights.outputs]
    if needs_input:
        dx, dlow = backward_in_place(group, wide)
        dx = ops.rms_norm_backward(dx, x, norm.weight, rstd, skip)
    elif low is not None:
        dlow = dy @ group.weights.shadow_b
    if low is None or dlow is None:
        return dx, [None] * len(group.parameters())
    a_grads = ((dlow * rstd[:, None]).to(x.dtype).T @ x).mul_(norm.weight)
    return dx, backward_factors(group, dy, low, a_grads)


def normed(group: Group, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """norm(x) with room for the update, and 1/rms."""
    wide = room_for_input(group, x)
    return wide, ops.rms_norm(x, norm.weight, norm.epsilon, wide[:, : x.shape[1]])
