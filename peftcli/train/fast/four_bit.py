"""Frozen 4-bit weights, expanded at each use into a buffer that all groups share."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from peftcli.train.fast.weights import Matrix, product, row_stride

_SCRATCH: dict[tuple[torch.device, torch.dtype], Tensor] = {}


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

    def times(self, wide: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        y = wide.new_empty(len(wide), self.outputs) if out is None else out
        for layer, rows in enumerate(self._places()):
            matrix = self._expanded(layer, layer + 1)[: rows.stop - rows.start].T
            product(wide, matrix, None if bias is None else bias[rows], y[:, rows])
        return y

    def times_back(self, wide: Tensor) -> Tensor:
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


def _expand(weight: Any, out: Tensor) -> None:
    if weight.is_cuda:
        from peftcli.train.fast import triton_ops

        triton_ops.dequantize(weight.data, weight.quant_state, out)
        return
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(weight.data, weight.quant_state))


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """One buffer for all expanded weights: they are used one after the other on one stream."""
    stride = row_stride(columns)
    held = _SCRATCH.get((like.device, like.dtype))
    if held is None or held.numel() < rows * stride:
        held = _SCRATCH[like.device, like.dtype] = like.new_empty(rows * stride)
    return held[: rows * stride].view(rows, stride)[:, :columns]
