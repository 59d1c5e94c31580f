"""Forward and backward products of a group of linears, frozen weights and LoRA factors together.

y = [x | x A'] [W | s B]' + b is one product for all layers of a group (two with fp8 weights). For
the backward pass only x A', which is as narrow as the ranks, is kept beside the input. Where the
input is a norm's output, the input of the norm is kept instead: dA = dz' norm(x) = ((dz / rms)' x)
* weight, so the normed rows are never needed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def backward_input(group: Group, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and of x A'."""
    dlow = dy @ group.weights.shadow_b if group.columns else None
    return group.weights.backward(dy, dlow), dlow


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
    group: Group, room: Tensor, wide: Any, x: Tensor, low: Tensor | None, norm: Norm, rstd: Tensor,
    skip: Tensor | None, needs_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Back through a group and the norm before it, whose input is `x`; `skip` is added.

    `room`, from `room_for_output`, holds the gradient of the group's output; `wide` is the same in
    the form of the group's weights.
    """
    dx, weights = None, group.weights
    dy = room[:, : weights.outputs]
    dlow = None if low is None else dy @ weights.shadow_b
    if needs_input:
        dx = weights.backward_in_place(wide, dlow)
        dx = ops.rms_norm_backward(dx, x, norm.weight, rstd, skip)
    if low is None or dlow is None:
        return dx, [None] * len(group.parameters())
    a_grads = ((dlow * rstd[:, None]).to(x.dtype).T @ x).mul_(norm.weight)
    return dx, backward_factors(group, dy, low, a_grads)


def normed(group: Group, x: Tensor, norm: Norm) -> tuple[Any, Tensor]:
    """norm(x) in the form of the group's weights, and 1/rms."""
    return group.weights.normed(x, norm.weight, norm.epsilon)
