"""A group of frozen linears in fp8, multiplied as they are: half the memory of 16 bits, and
twice the peak rate of the matrix units.

Weights have a scale for each output, inputs and gradients one for each token:

    y  = (xq Wq') * (scales of x) * (scales of W)
    dx = (gq Wq) * (scales of g),  where g = dy * (scales of W)

so one copy of the codes serves both passes. The matrix units want the second operand of a product
to lie by columns, so the backward pass turns the codes over into a buffer first. The factors stay
in 16 bits, and their share is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcli import fp8
from peftcli.train.fast import ops

# In both passes sums stay in the matrix units, which keep about 14 bits of them (arXiv 2412.19437),
# beside codes of 4; False moves them to float32 every few products: more exact and slower.
FAST_SUMS = True

_TURNED: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class Coded:
    """Rows in 16 bits, for the factors, and in 8, for the weights."""

    values: Tensor
    codes: Tensor
    scales: Tensor
    """(rows x 1)"""


class Fp8:
    """A group in 8 bits; the model's parameters become views of the codes."""

    in_room = False

    def __init__(self, layers: list[nn.Linear], columns: int, apart: bool = False) -> None:
        first = layers[0].weight
        self.inputs = first.shape[1]
        self.outputs = sum(layer.weight.shape[0] for layer in layers)
        kind: dict[str, Any] = {"dtype": first.dtype, "device": first.device}
        self.shadow_a = torch.zeros(columns, self.inputs, **kind)
        self.shadow_b = torch.zeros(self.outputs, columns, **kind)
        self.codes = torch.empty(self.outputs, self.inputs, dtype=fp8.DTYPE, device=first.device)
        self.scales = torch.empty(self.outputs, 1, dtype=torch.float32, device=first.device)
        start = 0
        for layer in layers:
            rows = slice(start, start + layer.weight.shape[0])
            fp8.quantize_weight(layer.weight.data, self.codes[rows], self.scales[rows])
            layer.weight.data = self.codes[rows]  # which frees the 16-bit weight
            start = rows.stop
        self._ones = torch.ones(1, self.inputs, dtype=torch.float32, device=first.device)

    def held(self) -> Fp8:
        return self

    def room(self, like: Tensor, columns: int) -> Tensor:
        """Nothing is kept beside it: the products want rows that lie end to end."""
        return like.new_empty(len(like), columns)

    def normed(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Coded, Tensor]:
        values = torch.empty_like(x)
        if x.is_cuda:
            from peftcli.train.fast import triton_fp8

            *codes, rstd = triton_fp8.rms_norm(x, weight, epsilon, values)
            return Coded(values, *codes), rstd
        rstd = ops.rms_norm(x, weight, epsilon, values)
        return coded(values), rstd

    def gated(self, both: Tensor) -> Coded:
        values = self.room(both, self.inputs)
        if both.is_cuda:
            from peftcli.train.fast import triton_fp8

            return Coded(values, *triton_fp8.swiglu(both, values))
        ops.swiglu(both, values)
        return coded(values)

    def gated_backward(
        self, dh: Tensor, room: Tensor, low: Tensor | None, factors: Tensor
    ) -> tuple[Coded, Tensor | None]:
        if low is not None:
            dh.addmm_(low, factors)
        if room.is_cuda:
            from peftcli.train.fast import triton_fp8

            wide = Coded(room, *triton_fp8.swiglu_backward(dh, room, self.scales))
        else:
            ops.swiglu_backward(dh, room)
            wide = coded(room, self.scales)
        return wide, None if low is None else ops.factor_gradient(low, dh)

    def low(self, wide: Coded) -> Tensor | None:
        return wide.values @ self.shadow_a.T if len(self.shadow_a) else None

    def forward(
        self, x: Tensor, low: Tensor | None, bias: Tensor | None, add: Tensor | None = None
    ) -> Tensor:
        return self.forward_in_place(coded(x), low, bias, None, add)

    def forward_in_place(
        self, wide: Coded, low: Tensor | None, bias: Tensor | None, out: Tensor | None,
        add: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = self.room(wide.values, self.outputs) if out is None else out
        multiply(wide.codes, self.codes.T, wide.scales, self.scales.T, bias, y)
        return ops.add_(y, low, self.shadow_b, add)

    def backward_low(self, room: Tensor) -> Tensor | None:
        return room @ self.shadow_b if len(self.shadow_a) else None

    def backward(self, dy: Tensor, dlow: Tensor | None) -> Tensor:
        return self.backward_in_place(dy, dlow)

    def backward_in_place(self, wide: Tensor | Coded, dlow: Tensor | None) -> Tensor:
        dy = wide if isinstance(wide, Coded) else coded(wide, self.scales)
        dx = self.room(dy.values, self.inputs)
        multiply(dy.codes, turned(self.codes), dy.scales, self._ones, None, dx)
        return dx if dlow is None else dx.addmm_(dlow, self.shadow_a)


def coded(values: Tensor, factors: Tensor | None = None) -> Coded:
    """Rows with their codes; of a gradient with those of its product with the weights' scales."""
    return Coded(values, *quantize_rows(values, factors))


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(tokens x columns), times a factor (columns x 1) each -> codes, and scales (tokens x 1)."""
    if x.is_cuda:
        from peftcli.train.fast import triton_fp8

        return triton_fp8.quantize_rows(x, factors)
    return fp8.quantize_rows(x, None if factors is None else factors.T)


def multiply(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """(a * a_scales) (b * b_scales) + bias into `out`; codes (m x k), and (k x n) by columns."""
    if a.is_cuda:
        torch._scaled_mm(
            a, b, a_scales, b_scales, bias=bias, out_dtype=out.dtype,
            use_fast_accum=FAST_SUMS, out=out,
        )  # fmt: skip
        return
    kind = torch.float64 if out.dtype == torch.float64 else torch.float32
    product = (a.to(kind) @ b.to(kind)) * a_scales * b_scales
    out.copy_(product if bias is None else product + bias)


def forget_turned() -> None:
    """Free the buffers of `turned`; the next use makes them again."""
    _TURNED.clear()


def turned(codes: Tensor) -> Tensor:
    """The same codes lying by columns, until the next call: used one after the other."""
    if not codes.is_cuda:
        return codes
    from peftcli.train.fast import triton_products

    held = _TURNED.get(codes.device)
    if held is None or held.numel() < codes.numel():
        held = _TURNED[codes.device] = codes.new_empty(codes.numel())
    room = held[: codes.numel()].view(codes.shape[1], codes.shape[0])
    triton_products.turn(codes, room)
    return room.T
