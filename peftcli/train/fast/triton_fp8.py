"""Triton kernels that quantise rows where they are made, for products in fp8.

Imported on CUDA only, like `triton_ops`. Rows are quantised as they are stored, in 16 bits, so that
each kernel gives what its twin in `ops` followed by `peftcli/fp8.py` gives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcli import fp8

WHOLE = 32768  # columns that one program holds in registers; longer rows are read twice
WHOLE_PAIR = 16384  # the same for gate and up together


@triton.jit
def _scaled(x, factors, at, inside, FACTORS: tl.constexpr):
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if FACTORS:
        values *= tl.load(factors + at, mask=inside, other=0.0)
    return values


@triton.jit
def _quantize_rows_kernel(
    x, factors, codes, scales, stride, COLUMNS: tl.constexpr, FACTORS: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    codes += row * COLUMNS
    at = tl.arange(0, BLOCK)
    if COLUMNS <= BLOCK:
        values = _scaled(x, factors, at, at < COLUMNS, FACTORS)
        highest = tl.maximum(tl.max(tl.abs(values), 0), FLOOR)
        coded = (values * (LARGEST / highest)).to(codes.dtype.element_ty)
        tl.store(codes + at, coded, mask=at < COLUMNS)
    else:
        most = tl.zeros([BLOCK], tl.float32)
        for first in range(0, COLUMNS, BLOCK):
            here = first + at
            most = tl.maximum(most, tl.abs(_scaled(x, factors, here, here < COLUMNS, FACTORS)))
        highest = tl.maximum(tl.max(most, 0), FLOOR)
        for first in range(0, COLUMNS, BLOCK):
            here = first + at
            values = _scaled(x, factors, here, here < COLUMNS, FACTORS)
            coded = (values * (LARGEST / highest)).to(codes.dtype.element_ty)
            tl.store(codes + here, coded, mask=here < COLUMNS)
    tl.store(scales + row, highest / LARGEST)


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(tokens x columns), times a factor for each column -> codes, and scales (tokens x 1)."""
    rows, columns = x.shape
    codes, scales = _room(rows, columns, x)
    block = min(triton.next_power_of_2(columns), WHOLE)
    _quantize_rows_kernel[(rows,)](
        x, x if factors is None else factors, codes, scales, x.stride(0),
        COLUMNS=columns, FACTORS=factors is not None, LARGEST=fp8.LARGEST, FLOOR=fp8.FLOOR,
        BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return codes, scales


@triton.jit
def _rms_norm_kernel(
    x, weight, y, rstd, codes, scales, columns, epsilon,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    tl.store(rstd + row, scale)
    normed = (wide * scale).to(values.dtype).to(tl.float32)  # rounded as transformers rounds it
    scaled = normed * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    stored = scaled.to(values.dtype)
    tl.store(y + row * columns + at, stored, mask=inside)
    stored = stored.to(tl.float32)
    highest = tl.maximum(tl.max(tl.abs(stored), 0), FLOOR)
    coded = (stored * (LARGEST / highest)).to(codes.dtype.element_ty)
    tl.store(codes + row * columns + at, coded, mask=inside)
    tl.store(scales + row, highest / LARGEST)


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows in `out`; their codes and scales, and 1/rms of each row in float32."""
    rows, columns = x.shape
    codes, scales = _room(rows, columns, x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _rms_norm_kernel[(rows,)](
        x, weight, out, rstd, codes, scales, columns, epsilon,
        LARGEST=fp8.LARGEST, FLOOR=fp8.FLOOR, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return codes, scales, rstd


@triton.jit
def _gated(both, at, inside, COLUMNS: tl.constexpr):
    narrow = tl.load(both + at, mask=inside, other=0.0)
    wide = narrow.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(narrow.dtype).to(tl.float32)
    up = tl.load(both + COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
    return (silu * up).to(narrow.dtype)


@triton.jit
def _swiglu_kernel(
    both, out, codes, scales, COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    both += row * (2 * COLUMNS)
    out += row * COLUMNS
    codes += row * COLUMNS
    lane = tl.arange(0, BLOCK)
    if COLUMNS <= BLOCK:
        product = _gated(both, lane, lane < COLUMNS, COLUMNS)
        tl.store(out + lane, product, mask=lane < COLUMNS)
        product = product.to(tl.float32)
        highest = tl.maximum(tl.max(tl.abs(product), 0), FLOOR)
        coded = (product * (LARGEST / highest)).to(codes.dtype.element_ty)
        tl.store(codes + lane, coded, mask=lane < COLUMNS)
    else:
        most = tl.zeros([BLOCK], tl.float32)
        for first in range(0, COLUMNS, BLOCK):
            at = first + lane
            product = _gated(both, at, at < COLUMNS, COLUMNS)
            tl.store(out + at, product, mask=at < COLUMNS)
            most = tl.maximum(most, tl.abs(product.to(tl.float32)))
        highest = tl.maximum(tl.max(most, 0), FLOOR)
        tl.debug_barrier()  # what is read again was written by another warp, perhaps
        for first in range(0, COLUMNS, BLOCK):
            at = first + lane
            product = tl.load(out + at, mask=at < COLUMNS, other=0.0).to(tl.float32)
            coded = (product * (LARGEST / highest)).to(codes.dtype.element_ty)
            tl.store(codes + at, coded, mask=at < COLUMNS)
    tl.store(scales + row, highest / LARGEST)


def swiglu(both: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up into `out`, and its codes and scales; rows of both lie end to end."""
    rows, columns = out.shape
    codes, scales = _room(rows, columns, out)
    block = _block(columns)
    _swiglu_kernel[(rows,)](
        both, out, codes, scales, COLUMNS=columns,
        LARGEST=fp8.LARGEST, FLOOR=fp8.FLOOR, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return codes, scales


@triton.jit
def _ungated(dh, both, at, inside, COLUMNS: tl.constexpr):
    narrow = tl.load(both + at, mask=inside, other=0.0)
    up = tl.load(both + COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
    wide = narrow.to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    silu = (wide * sigmoid).to(narrow.dtype).to(tl.float32)
    dgate = (grad * up * sigmoid * (1 + wide * (1 - sigmoid))).to(narrow.dtype)
    dup = (grad * silu).to(narrow.dtype)
    tl.store(dh + at, (silu * up).to(narrow.dtype), mask=inside)
    tl.store(both + at, dgate, mask=inside)
    tl.store(both + COLUMNS + at, dup, mask=inside)
    return dgate, dup


@triton.jit
def _swiglu_backward_kernel(
    dh, both, factors, codes, scales, COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dh += row * COLUMNS
    both += row * (2 * COLUMNS)
    codes += row * (2 * COLUMNS)
    lane = tl.arange(0, BLOCK)
    if COLUMNS <= BLOCK:
        inside = lane < COLUMNS
        dgate, dup = _ungated(dh, both, lane, inside, COLUMNS)
        gate = dgate.to(tl.float32) * tl.load(factors + lane, mask=inside, other=0.0)
        up = dup.to(tl.float32) * tl.load(factors + COLUMNS + lane, mask=inside, other=0.0)
        highest = tl.max(tl.maximum(tl.abs(gate), tl.abs(up)), 0)
        highest = tl.maximum(highest, FLOOR)
        inverse = LARGEST / highest
        kind = codes.dtype.element_ty
        tl.store(codes + lane, (gate * inverse).to(kind), mask=inside)
        tl.store(codes + COLUMNS + lane, (up * inverse).to(kind), mask=inside)
    else:
        most = tl.zeros([BLOCK], tl.float32)
        for first in range(0, COLUMNS, BLOCK):
            at = first + lane
            inside = at < COLUMNS
            dgate, dup = _ungated(dh, both, at, inside, COLUMNS)
            gate = dgate.to(tl.float32) * tl.load(factors + at, mask=inside, other=0.0)
            up = dup.to(tl.float32) * tl.load(factors + COLUMNS + at, mask=inside, other=0.0)
            most = tl.maximum(most, tl.maximum(tl.abs(gate), tl.abs(up)))
        highest = tl.maximum(tl.max(most, 0), FLOOR)
        tl.debug_barrier()
        for first in range(0, 2 * COLUMNS, BLOCK):
            at = first + lane
            inside = at < 2 * COLUMNS
            grad = _scaled(both, factors, at, inside, True)
            coded = (grad * (LARGEST / highest)).to(codes.dtype.element_ty)
            tl.store(codes + at, coded, mask=inside)
    tl.store(scales + row, highest / LARGEST)


def swiglu_backward(dh: Tensor, both: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """As `triton_ops.swiglu_backward`; codes and scales of the gradients of both times factors.

    Rows lie end to end; there is a factor for each column of `both`.
    """
    rows, columns = dh.shape
    codes, scales = _room(rows, 2 * columns, dh)
    block = _block(columns)
    _swiglu_backward_kernel[(rows,)](
        dh, both, factors, codes, scales, COLUMNS=columns,
        LARGEST=fp8.LARGEST, FLOOR=fp8.FLOOR, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return codes, scales


def _room(rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(rows, columns, dtype=fp8.DTYPE, device=like.device)
    return codes, torch.empty(rows, 1, dtype=torch.float32, device=like.device)


def _block(columns: int) -> int:
    """A whole row where registers hold it, which is then read once."""
    block: int = triton.next_power_of_2(columns)
    return block if block <= WHOLE_PAIR else 2048


def _warps(block: int) -> int:
    return min(32, max(1, block // 512))
