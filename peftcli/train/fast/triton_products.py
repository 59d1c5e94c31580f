"""Triton kernels before and after products in fp8: turn weights over, add the update's share.

Imported on CUDA only, like `triton_ops`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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


@triton.jit
def _add_both_kernel(
    y, low, factors, add, rows, columns, ranks, factors_stride,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(y + at, mask=inside, other=0.0)
    more = tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    known = (rank < ranks)[None, :]
    left = tl.load(
        low + row[:, None] * ranks + rank[None, :], mask=(row < rows)[:, None] & known, other=0.0
    )
    right = tl.load(
        factors + column.to(tl.int64)[:, None] * factors_stride + rank[None, :],
        mask=(column < columns)[:, None] & known,
        other=0.0,
    )
    total = tl.dot(left, tl.trans(right), input_precision="ieee") + values.to(tl.float32) + more
    tl.store(y + at, total.to(values.dtype), mask=inside)


def add_both(y: Tensor, low: Tensor, factors: Tensor, add: Tensor) -> None:
    """y += low factors' + add: (rows x columns), (rows x ranks), (columns x ranks).

    All are dense, but for the rows of `factors`, which may lie apart.
    """
    rows, columns = y.shape
    ranks = low.shape[1]
    side_rows, side_columns = 64, 128
    grid = (triton.cdiv(rows, side_rows), triton.cdiv(columns, side_columns))
    _add_both_kernel[grid](
        y, low, factors, add, rows, columns, ranks, factors.stride(0),
        RANKS=max(16, triton.next_power_of_2(ranks)), ROWS=side_rows, COLUMNS=side_columns,
        num_warps=8,
    )  # fmt: skip
