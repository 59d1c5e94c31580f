"""Frozen weights of linears that share an input, one below the other, with their LoRA factors.

A group is one matrix, with the scaled B matrices beside the weights and the A matrices below:

    W | s B        so that  [x | x A'] [W | s B]'  is the forward pass, and
    A |            [dy | dy s B] [W ; A]  the gradient of the input: one product each.

In 16 bits the base's own weights move into that matrix, and the model's parameters become views of
it; 4-bit weights are expanded into a buffer when they are used. Weights in fp8 (`fp8.py`) are
multiplied as they are, and the factors' share is added.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftcli.train.fast import ops

_SCRATCH: dict[tuple[torch.device, torch.dtype], Tensor] = {}


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

    def backward(self, dy: Tensor, dlow: Tensor | None) -> Tensor:
        """dy W + dlow A."""

    def backward_in_place(self, wide: Any, dlow: Tensor | None) -> Tensor:
        """The same for a gradient in its form."""


class Matrix:
    """Products with a group that is one matrix whenever it is used."""

    inputs: int
    outputs: int
    shadow_a: Tensor
    shadow_b: Tensor
    in_room = True

    def matrix(self) -> Tensor:
        """(outputs + columns x inputs + columns); of 4-bit layers until any group's next call."""
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
        matrix = self.matrix()[: self.outputs].T
        if out is not None:
            out = out[:, : self.outputs]
        y = _product(wide, matrix, bias, out)
        return y if add is None else y.add_(add)

    def backward(self, dy: Tensor, dlow: Tensor | None) -> Tensor:
        dx = dy @ self.matrix()[: self.outputs, : self.inputs]
        return dx if dlow is None else dx.addmm_(dlow, self.shadow_a)

    def backward_in_place(self, wide: Tensor, dlow: Tensor | None) -> Tensor:
        if dlow is not None:
            wide[:, self.outputs :] = dlow
        return wide @ self.matrix()[:, : self.inputs]


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

    def matrix(self) -> Tensor:
        return self._matrix


class Quantized(Matrix):
    """A group in 4 bits, expanded at each use."""

    def __init__(self, layers: list[Any], columns: int) -> None:
        self.packed = [layer.weight for layer in layers]
        state = self.packed[0].quant_state
        self.inputs = state.shape[1]
        self.rows = [weight.quant_state.shape[0] for weight in self.packed]
        self.outputs = sum(self.rows)
        kind = {"dtype": state.dtype, "device": self.packed[0].device}
        self.shadow_a = torch.zeros(columns, self.inputs, **kind)
        self.shadow_b = torch.zeros(self.outputs, columns, **kind)

    def matrix(self) -> Tensor:
        return self._expanded(0, len(self.packed))

    def held(self) -> Matrix:
        return Expanded(self)

    def _expanded(self, first: int, end: int) -> Tensor:
        """The rows of some of the layers; those of A below the last layer's."""
        start = sum(self.rows[:first])
        outputs = sum(self.rows[first:end])
        columns = len(self.shadow_a)
        below = columns if end == len(self.packed) else 0
        out = _scratch(outputs + below, self.inputs + columns, self.shadow_a)
        if columns:
            out[outputs:, : self.inputs].copy_(self.shadow_a[:below])
            out[:outputs, self.inputs :].copy_(self.shadow_b[start : start + outputs])
        row = 0
        for weight, rows in zip(self.packed[first:end], self.rows[first:end], strict=True):
            _expand(weight, out[row : row + rows, : self.inputs])
            row += rows
        return out


class Expanded(Matrix):
    """A group in 4 bits in its room, which the next group to be expanded takes."""

    def __init__(self, group: Quantized) -> None:
        self.inputs, self.outputs = group.inputs, group.outputs
        self.shadow_a, self.shadow_b = group.shadow_a, group.shadow_b
        self._matrix = group.matrix()

    def matrix(self) -> Tensor:
        return self._matrix


class Apart(Quantized):
    """A group in 4 bits whose layers are expanded and multiplied one after the other.

    That halves the room that gate and up need, for one more pass over the gradient of their input.
    """

    def forward_in_place(
        self, wide: Tensor, low: Tensor | None, bias: Tensor | None, out: Tensor | None,
        add: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if low is not None:
            wide[:, self.inputs :] = low
        y = wide.new_empty(len(wide), self.outputs) if out is None else out[:, : self.outputs]
        for layer, rows in enumerate(self._places()):
            matrix = self._expanded(layer, layer + 1)[: rows.stop - rows.start].T
            _product(wide, matrix, None if bias is None else bias[rows], y[:, rows])
        return y if add is None else y.add_(add)

    def backward_in_place(self, wide: Tensor, dlow: Tensor | None) -> Tensor:
        if dlow is not None:
            wide[:, self.outputs :] = dlow
        dx = None
        for layer, rows in enumerate(self._places()):
            matrix = self._expanded(layer, layer + 1)[:, : self.inputs]
            part = wide[:, rows.start : rows.start + len(matrix)]
            dx = part @ matrix if dx is None else dx.addmm_(part, matrix)
        assert dx is not None  # a group has layers
        return dx

    def _places(self) -> list[slice]:
        """The outputs of each layer."""
        ends = list(accumulate(self.rows))
        return [slice(end - rows, end) for end, rows in zip(ends, self.rows, strict=True)]


def forget_room() -> None:
    """Free the buffer that expanded weights share; the next use makes it again."""
    _SCRATCH.clear()


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty matrix whose rows begin at multiples of 128 bytes, as the matrix units like best."""
    return torch.empty(rows, _stride(columns), dtype=dtype, device=device)[:, :columns]


def weights_of(layers: list[Any], columns: int, apart: bool = False) -> Weights:
    """The weights of plain or 4-bit linears that share an input; `apart` is for the latter."""
    if hasattr(layers[0].weight, "quant_state"):
        return Apart(layers, columns) if apart else Quantized(layers, columns)
    return Resident(layers, columns)


def _product(wide: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(wide, matrix, out=out)
    return torch.addmm(bias, wide, matrix, out=out)


def _expand(weight: Any, out: Tensor) -> None:
    if weight.is_cuda:
        from peftcli.train.fast import triton_ops

        triton_ops.dequantize(weight.data, weight.quant_state, out)
        return
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(weight.data, weight.quant_state))


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """One buffer for all expanded weights: they are used one after the other on one stream."""
    stride = _stride(columns)
    held = _SCRATCH.get((like.device, like.dtype))
    if held is None or held.numel() < rows * stride:
        held = _SCRATCH[like.device, like.dtype] = like.new_empty(rows * stride)
    return held[: rows * stride].view(rows, stride)[:, :columns]


def _stride(columns: int) -> int:
    return -(-columns // 64) * 64
