"""Forward and backward products of a group of linears, frozen weights and LoRA factors together.

y = [x | x A'] [W | s B]' + b is one product for all layers of a group (two with fp8 weights). For
the backward pass only x A', which is as narrow as the ranks, is kept beside the input. Where the
input is a norm's output, the input of the norm is kept instead: dA = dz' norm(x) = ((dz / rms)' x)
* weight, so the normed rows are never needed again.
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


def room_for_output(group: Group, x: Tensor) -> Tensor:
    """Room for (tokens x outputs), in which the output takes the first columns."""
    return group.weights.room(x, group.weights.outputs)


def forward_in_place(
    group: Group, wide: Any, out: Tensor | None = None, add: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Outputs of all layers side by side plus `add`, and x A' (None without adapters).

    `wide` is an input in the form of the group's weights, `out` comes from `room_for_output`.
    """
    low = group.weights.low(wide)
    return group.weights.forward_in_place(wide, low, group.bias, out, add), low


def forward(group: Group, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The same for an input that lies somewhere else and would have to be copied."""
    low = x @ group.weights.shadow_a.T if group.columns else None
    return group.weights.forward(x, low, group.bias, add), low


def backward_low(group: Group, dy: Tensor) -> Tensor | None:
    """Gradient of x A' from that of the output; None without adapters."""
    return dy @ group.weights.shadow_b if group.columns else None


def backward_factors(
    group: Group, dy: Tensor, low: Tensor | None, a_grads: Tensor | None
) -> list[Tensor | None]:
    """Gradients of A and B of each layer; `a_grads` are those of all A, one below the other."""
    if low is None or a_grads is None:
        return [None] * len(group.parameters())
    b_grads = ops.factor_gradient(dy, low)  # at once: one read, and narrow products are slow
    found: list[Tensor | None] = []
    for factor in group.factors:
        if factor is None:
            found += [None, None]
            continue
        found += [a_grads[factor.columns], b_grads[factor.rows, factor.columns] * factor.scale]
    return found


def backward_normed(
    group: Group, room: Tensor, wide: Any, x: Tensor, low: Tensor | None, norm: Norm, rstd: Tensor,
    skip: Tensor | None, needs_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Back through a group and the norm before it, whose input is `x`; `skip` is added.

    `room`, from `room_for_output`, holds the gradient of the group's output; `wide` is the same in
    the form of the group's weights.
    """
    dx, dy = None, room[:, : group.weights.outputs]
    dlow = group.weights.backward_low(room)
    if needs_input:
        dx = group.weights.backward_in_place(wide, dlow)
        dx = ops.rms_norm_backward(dx, x, norm.weight, rstd, skip)
    a_grads = None
    if dlow is not None:
        scaled = torch.mul(dlow, rstd[:, None], out=x.new_empty(dlow.shape))
        a_grads = ops.factor_gradient(scaled, x).mul_(norm.weight)
    return dx, backward_factors(group, dy, low, a_grads)


def normed(group: Group, x: Tensor, norm: Norm) -> tuple[Any, Tensor]:
    """norm(x) in the form of the group's weights, and 1/rms."""
    return group.weights.normed(x, norm.weight, norm.epsilon)
