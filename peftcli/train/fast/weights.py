"""Frozen weights of linears that share an input, one below the other, with their LoRA factors.

A group is one matrix, with the scaled B matrices beside the weights and the A matrices below:

    W | s B        so that  [x | x A'] [W | s B]'  is the forward pass, and
    A |            [dy | dy s B] [W ; A]  the gradient of the input: one product each.

In 16 bits the base's own weights move into that matrix, and the model's parameters become views of
it; 4-bit weights (`four_bit.py`) are expanded into a buffer when they are used. Weights in fp8
(`fp8.py`) are multiplied as they are, and the factors' share is added.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftcli.train.fast import ops


class Weights(Protocol):
    """The frozen weights of one group, and the products with them.

    `wide` is an input or a gradient in the form that suits the products: what `normed`, `gated` or
    `gated_backward` gave, or a `room` with the values in its first columns. `low` is x A' and
    `dlow` its gradient, None without adapters.
    """

    inputs: int
    outputs: int
    shadow_a: Tensor
    """(columns of the update x inputs): the A matrices."""
    shadow_b: Tensor
    """(outputs x columns of the update): the scaled B matrices, block by block."""
    in_room: bool
    """Whether `gated_backward` gives the room itself back, so that it can be called for some of
    its rows after the other."""

    def held(self) -> Weights:
        """These, ready for several products; no other group may be used in between."""

    def room(self, like: Tensor, columns: int) -> Tensor:
        """(tokens x columns or more), of which an input or output takes the first columns."""

    def normed(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Any, Tensor]:
        """RMS norm of x, as an input, and 1/rms."""

    def gated(self, both: Tensor) -> Any:
        """silu(gate) * up, as an input; `both` holds the two side by side."""

    def gated_backward(
        self, dh: Tensor, room: Tensor, low: Tensor | None, factors: Tensor
    ) -> tuple[Any, Tensor | None]:
        """Overwrites gate and up in `room` with their gradients; these in their form.

        `dh` is the gradient of h without the share of the down projection's factors, low factors',
        and may be overwritten; the gradient of the factors comes second.
        """

    def low(self, wide: Any) -> Tensor | None:
        """x A' of an input."""

    def forward(
        self, x: Tensor, low: Tensor | None, bias: Tensor | None, add: Tensor | None = None
    ) -> Tensor:
        """x W' + low (s B)' + bias + add."""

    def forward_in_place(
        self, wide: Any, low: Tensor | None, bias: Tensor | None, out: Tensor | None,
        add: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The same for an input in its form, into the room `out` if there is one."""

    def backward_low(self, room: Tensor) -> Tensor | None:
        """dy (s B) of the gradient in a room, kept there if it has columns for it."""

    def backward(self, dy: Tensor, dlow: Tensor | None) -> Tensor:
        """dy W + dlow A."""

    def backward_in_place(self, wide: Any, dlow: Tensor | None) -> Tensor:
        """The same for a gradient in its form, and what `backward_low` gave."""


class Matrix:
    """Products with a group that is one matrix whenever it is used."""

    inputs: int
    outputs: int
    shadow_a: Tensor
    shadow_b: Tensor
    in_room = True

    def matrix(self, *, right: bool = False, below: bool = False) -> Tensor:
        """(outputs + columns x inputs + columns); of 4-bit layers until any group's next call.

        Unless they are asked for, the columns to the `right` and the rows `below` the weights may
        hold anything.
        """
        raise NotImplementedError

    def held(self) -> Matrix:
        return self

    def room(self, like: Tensor, columns: int) -> Tensor:
        return aligned(len(like), columns + len(self.shadow_a), like.dtype, like.device)

    def normed(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        wide = self.room(x, self.inputs)
        return wide, ops.rms_norm(x, weight, epsilon, wide[:, : self.inputs])

    def gated(self, both: Tensor) -> Tensor:
        wide = self.room(both, self.inputs)
        ops.swiglu(both, wide[:, : self.inputs])
        return wide

    def gated_backward(
        self, dh: Tensor, room: Tensor, low: Tensor | None, factors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        both = room[:, : self.outputs]
        if low is not None:
            return room, ops.gated_backward(dh, both, low, factors)
        ops.swiglu_backward(dh, both)
        return room, None

    def low(self, wide: Tensor) -> Tensor | None:
        return wide[:, : self.inputs] @ self.shadow_a.T if len(self.shadow_a) else None

    def forward(
        self, x: Tensor, low: Tensor | None, bias: Tensor | None, add: Tensor | None = None
    ) -> Tensor:
        matrix = self.matrix()[: self.outputs, : self.inputs].T
        y = x @ matrix if bias is None else torch.addmm(bias, x, matrix)
        return ops.add_(y, low, self.shadow_b, add)

    def forward_in_place(
        self, wide: Tensor, low: Tensor | None, bias: Tensor | None, out: Tensor | None,
        add: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if low is not None:
            wide[:, self.inputs :] = low
        y = self.times(wide, bias, None if out is None else out[:, : self.outputs])
        return y if add is None else y.add_(add)

    def backward(self, dy: Tensor, dlow: Tensor | None) -> Tensor:
        dx = dy @ self.matrix()[: self.outputs, : self.inputs]
        return dx if dlow is None else dx.addmm_(dlow, self.shadow_a)

    def backward_low(self, room: Tensor) -> Tensor | None:
        if not len(self.shadow_a):
            return None
        dy, beside = room[:, : self.outputs], room[:, self.outputs :]
        return torch.mm(dy, self.shadow_b, out=beside)

    def backward_in_place(self, wide: Tensor, dlow: Tensor | None) -> Tensor:
        return self.times_back(wide)

    def times(self, wide: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """[x | x A'] [W | s B]' + bias, into `out` if there is one."""
        return product(wide, self.matrix(right=True)[: self.outputs].T, bias, out)

    def times_back(self, wide: Tensor) -> Tensor:
        """[dy | dy s B] [W ; A]."""
        return wide @ self.matrix(below=True)[:, : self.inputs]


class Resident(Matrix):
    """A group in 16 bits (or more), held as one matrix."""

    def __init__(self, layers: list[nn.Linear], columns: int) -> None:
        first = layers[0].weight
        self.inputs = first.shape[1]
        self.outputs = sum(layer.weight.shape[0] for layer in layers)
        shape = self.outputs + columns, self.inputs + columns
        self._matrix = aligned(*shape, first.dtype, first.device)
        self._matrix[:, self.inputs :] = 0
        self.shadow_a = self._matrix[self.outputs :, : self.inputs].zero_()
        self.shadow_b = self._matrix[: self.outputs, self.inputs :]
        start = 0
        for layer in layers:
            part = self._matrix[start : start + layer.weight.shape[0], : self.inputs]
            part.copy_(layer.weight.data)
            layer.weight.data = part
            start += len(part)

    def matrix(self, *, right: bool = False, below: bool = False) -> Tensor:
        return self._matrix


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty matrix whose rows begin at multiples of 128 bytes, as the matrix units like best."""
    return torch.empty(rows, row_stride(columns), dtype=dtype, device=device)[:, :columns]


def product(wide: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """wide @ matrix + bias, into `out` if there is one."""
    if bias is None:
        return torch.mm(wide, matrix, out=out)
    return torch.addmm(bias, wide, matrix, out=out)


def row_stride(columns: int) -> int:
    """Columns from the beginning of a row to that of the next, in an `aligned` matrix."""
    return -(-columns // 64) * 64
