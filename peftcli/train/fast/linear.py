"""Forward and backward products of a group of linears, frozen weights and LoRA factors together.

y = [x | x A'] [W | s B]' + b is one product for all layers of a group. For the backward pass only
x A', which is as narrow as the ranks, is kept beside the input. Where the input is a norm's output,
the input of the norm is kept instead: dA = dz' norm(x) = ((dz / rms)' x) * weight, so the normed
rows are never needed again.
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


def room_for_update(group: Group, x: Tensor) -> Tensor:
    """(tokens x inputs + columns of the update), in which the input takes the first columns."""
    return x.new_empty(len(x), group.weights.inputs + group.weights.tail.shape[1])


def forward_in_place(group: Group, wide: Tensor) -> tuple[Tensor, Tensor | None]:
    """Outputs of all layers side by side, and x A'; `wide` comes from `room_for_update`."""
    low = None
    if group.shadow_a is not None:
        low = wide[:, : group.weights.inputs] @ group.shadow_a.T
        wide[:, group.weights.inputs :] = low
    matrix = group.weights.get(tail=True).T
    y = wide @ matrix if group.bias is None else torch.addmm(group.bias, wide, matrix)
    return y, low


def forward(group: Group, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same for an input that lies somewhere else and would have to be copied."""
    matrix = group.weights.get(tail=False).T
    y = x @ matrix if group.bias is None else torch.addmm(group.bias, x, matrix)
    if group.shadow_a is None:
        return y, None
    low = x @ group.shadow_a.T
    return y.addmm_(low, group.weights.tail.T), low


def backward_input(group: Group, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradient of the input, and of x A'."""
    dx = dy @ group.weights.get(tail=False)
    if group.shadow_a is None:
        return dx, None
    dlow = dy @ group.weights.tail
    return dx.addmm_(dlow, group.shadow_a), dlow


def backward_factors(
    group: Group, dy: Tensor, low: Tensor, a_grads: Tensor
) -> list[Tensor | None]:
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
    group: Group, dy: Tensor, x: Tensor, low: Tensor | None, norm: Norm, rstd: Tensor,
    skip: Tensor | None, needs_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Back through a group and the norm before it, whose input is `x`; `skip` is added."""
    dx = dlow = None
    if needs_input:
        dx, dlow = backward_input(group, dy)
        dx = ops.rms_norm_backward(dx, x, norm.weight, rstd, skip)
    elif low is not None:
        dlow = dy @ group.weights.tail
    if low is None or dlow is None:
        return dx, group.parameters() and [None] * len(group.parameters())
    a_grads = ((dlow * rstd[:, None]).to(x.dtype).T @ x).mul_(norm.weight)
    return dx, backward_factors(group, dy, low, a_grads)


def normed(group: Group, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """norm(x) with room for the update, and 1/rms."""
    wide = room_for_update(group, x)
    return wide, ops.rms_norm(x, norm.weight, norm.epsilon, wide[:, : x.shape[1]])
