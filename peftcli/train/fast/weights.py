"""Frozen weights of linears that share an input, one below the other, with the LoRA factors beside.

The rows of a group are [W | s B]: one product with [x | x A'] is the frozen layer and its update
at once. In 16 bits the base's own weights move into that matrix, and the model's parameters become
views of it; 4-bit weights are expanded into a buffer when they are used.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

_SCRATCH: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Weights(Protocol):
    """(sum of outputs) x (inputs + columns of the update) of one group."""

    inputs: int
    tail: Tensor
    """(sum of outputs x columns of the update): the scaled B matrices, block by block."""

    def get(self, *, tail: bool) -> Tensor:
        """[W | s B], or W alone; of a 4-bit group it holds until the next call of any group."""


class Resident:
    """A group in 16 bits (or more), held as one matrix."""

    def __init__(self, layers: list[nn.Linear], columns: int) -> None:
        first = layers[0].weight
        self.inputs = first.shape[1]
        rows = sum(layer.weight.shape[0] for layer in layers)
        self.matrix = torch.empty(
            rows, self.inputs + columns, dtype=first.dtype, device=first.device
        )
        self.tail = self.matrix[:, self.inputs :].zero_()
        start = 0
        for layer in layers:
            part = self.matrix[start : start + layer.weight.shape[0], : self.inputs]
            part.copy_(layer.weight.data)
            layer.weight.data = part
            start += len(part)

    def get(self, *, tail: bool) -> Tensor:
        return self.matrix if tail else self.matrix[:, : self.inputs]


class Quantized:
    """A group in 4 bits, expanded at each use."""

    def __init__(self, layers: list[Any], columns: int) -> None:
        self.packed = [layer.weight for layer in layers]
        state = self.packed[0].quant_state
        self.inputs = state.shape[1]
        self.rows = [weight.quant_state.shape[0] for weight in self.packed]
        self.dtype, self.device = state.dtype, self.packed[0].device
        self.tail = torch.zeros(sum(self.rows), columns, dtype=self.dtype, device=self.device)

    def get(self, *, tail: bool) -> Tensor:
        width = self.inputs + (self.tail.shape[1] if tail else 0)
        out = _scratch(sum(self.rows), width, self.dtype, self.device)
        if width > self.inputs:
            out[:, self.inputs :].copy_(self.tail)
        start = 0
        for weight, rows in zip(self.packed, self.rows, strict=True):
            _expand(weight, out[start : start + rows, : self.inputs])
            start += rows
        return out


def weights_of(layers: list[Any], columns: int) -> Weights:
    """The weights of plain or 4-bit linears that share an input."""
    if hasattr(layers[0].weight, "quant_state"):
        return Quantized(layers, columns)
    return Resident(layers, columns)


def _expand(weight: Any, out: Tensor) -> None:
    if weight.is_cuda:
        from peftcli.train.fast import triton_ops

        triton_ops.dequantize(weight.data, weight.quant_state, out)
        return
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(weight.data, weight.quant_state))


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One buffer for all expanded weights: they are used one after the other on one stream."""
    size = rows * columns
    held = _SCRATCH.get((device, dtype))
    if held is None or held.numel() < size:
        held = _SCRATCH[device, dtype] = torch.empty(size, dtype=dtype, device=device)
    return held[:size].view(rows, columns)
