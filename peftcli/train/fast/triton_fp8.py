"""Triton kernels around products in fp8: quantise rows, and turn a matrix of bytes over.

Imported on CUDA only, like `triton_ops`; the plain twins are in `peftcli/fp8.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcli import fp8

WHOLE = 32768  # columns that one program holds in registers; longer rows are read twice


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
    codes = torch.empty(rows, columns, dtype=fp8.DTYPE, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(columns), WHOLE)
    _quantize_rows_kernel[(rows,)](
        x, x if factors is None else factors, codes, scales, x.stride(0),
        COLUMNS=columns, FACTORS=factors is not None, LARGEST=fp8.LARGEST, FLOOR=fp8.FLOOR,
        BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return codes, scales


@triton.jit
def _turn_kernel(source, target, rows, columns, SIDE: tl.constexpr):
    row = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    start = row.to(tl.int64)[:, None] * columns
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(source + start + column[None, :], mask=inside, other=0)
    start = column.to(tl.int64)[:, None] * rows
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(target + start + row[None, :], tl.trans(tile), mask=inside)


def turn(source: Tensor, target: Tensor) -> None:
    """(rows x columns) bytes into (columns x rows) `target`; both lie end to end."""
    rows, columns = source.shape
    side = 128
    grid = (triton.cdiv(columns, side), triton.cdiv(rows, side))
    _turn_kernel[grid](
        source.view(torch.uint8), target.view(torch.uint8), rows, columns, SIDE=side, num_warps=8
    )
