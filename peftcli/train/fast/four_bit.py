"""Frozen 4-bit weights, expanded at each use into a buffer that all groups share."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from peftcli.train.fast.weights import Matrix, product, row_stride

Copy = tuple[Tensor, Tensor]
"""What is copied, and where to."""

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
        self._whole = self.part(self.packed, 0)

    def matrix(self, *, right: bool = False, below: bool = False) -> Tensor:
        return self._whole.expanded(right=right, below=below)

    def held(self) -> Matrix:
        return Expanded(self)

    def part(self, packed: list[Any], start: int) -> Part:
        """Some of the group's layers, whose outputs begin at `start`."""
        rows = slice(start, start + sum(weight.quant_state.shape[0] for weight in packed))
        last = rows.stop == self.outputs
        below = self.shadow_a if last else self.shadow_a[:0]
        return Part(packed, rows, self.shadow_b[rows], below)


class Part:
    """Layers of a group in 4 bits that are expanded together, and their share of the factors.

    A, which is below the last layer of a group, is `below`; B is to the `right`.
    """

    def __init__(self, packed: list[Any], rows: slice, right: Tensor, below: Tensor) -> None:
        self.packed, self.rows, self.right, self.below = packed, rows, right, below
        self.inputs, self.outputs = packed[0].quant_state.shape[1], len(right)
        self._expansion: Any = None

    def expanded(self, *, right: bool = False, below: bool = False) -> Tensor:
        """(outputs and rows below x inputs and columns to the right), until the next call."""
        columns = self.right.shape[1]
        out = _scratch(self.outputs + len(self.below), self.inputs + columns, self.right)
        copies: list[Copy] = []
        if right and columns:
            copies.append((self.right, out[: self.outputs, self.inputs :]))
        if below and len(self.below):
            copies.append((self.below, out[self.outputs :, : self.inputs]))
        self._expand(out, copies)
        return out

    def _expand(self, out: Tensor, copies: list[Copy]) -> None:
        if out.is_cuda:
            if self._expansion is None:
                from peftcli.train.fast.triton_four_bit import Expansion

                self._expansion = Expansion(self.packed)
            self._expansion.into(out, copies.pop() if copies else None)
        else:
            _expand_plainly(self.packed, out[: self.outputs, : self.inputs])
        for source, target in copies:
            target.copy_(source)


class Expanded(Matrix):
    """A group in 4 bits in its room, which the next group to be expanded takes."""

    def __init__(self, group: Quantized) -> None:
        self.inputs, self.outputs = group.inputs, group.outputs
        self.shadow_a, self.shadow_b = group.shadow_a, group.shadow_b
        self._matrix = group.matrix(right=True, below=True)

    def matrix(self, *, right: bool = False, below: bool = False) -> Tensor:
        return self._matrix


class Apart(Quantized):
    """A group in 4 bits whose layers are expanded and multiplied one after the other.

    That halves the room that gate and up need, for one more pass over the gradient of their input.
    """

    def __init__(self, layers: list[Any], columns: int) -> None:
        super().__init__(layers, columns)
        starts = accumulate(self.rows, initial=0)
        self.parts = [
            self.part([weight], start) for weight, start in zip(self.packed, starts, strict=False)
        ]

    def times(self, wide: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        y = wide.new_empty(len(wide), self.outputs) if out is None else out
        for part in self.parts:
            matrix = part.expanded(right=True)[: part.outputs].T
            product(wide, matrix, None if bias is None else bias[part.rows], y[:, part.rows])
        return y

    def times_back(self, wide: Tensor) -> Tensor:
        dx = None
        for part in self.parts:
            matrix = part.expanded(below=True)[:, : self.inputs]
            share = wide[:, part.rows.start : part.rows.start + len(matrix)]
            dx = share @ matrix if dx is None else dx.addmm_(share, matrix)
        assert dx is not None  # a group has layers
        return dx


def forget_room() -> None:
    """Free the buffer that expanded weights share; the next use makes it again."""
    _SCRATCH.clear()


def _expand_plainly(packed: list[Any], out: Tensor) -> None:
    from bitsandbytes.functional import dequantize_4bit

    row = 0
    for weight in packed:
        values = dequantize_4bit(weight.data, weight.quant_state)
        out[row : row + len(values)] = values
        row += len(values)


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """One buffer for all expanded weights: they are used one after the other on one stream."""
    stride = row_stride(columns)
    held = _SCRATCH.get((like.device, like.dtype))
    if held is None or held.numel() < rows * stride:
        held = _SCRATCH[like.device, like.dtype] = like.new_empty(rows * stride)
    return held.as_strided((rows, columns), (stride, 1))
