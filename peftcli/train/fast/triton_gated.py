"""The gated MLP's backward pass between its two large products, in one pass over memory.

Imported on CUDA only, like `triton_ops`. The share of the down projection's factors in the
gradient of h, the activation, and the gradient of those factors: all while the rows are there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_RANKS = 64  # the gradient of the factors stays in registers
ROWS, COLUMNS = 16, 64  # of a tile
SPLITS = 16  # programs that share the rows of a block of columns
WARPS = 2


@triton.jit
def _gated_backward_kernel(
    dh, both, low, factors, sums, rows, columns, both_stride, factors_stride, ranks,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    inside, known = (at < columns)[None, :], rank < ranks
    start = factors + rank[:, None] * factors_stride + at[None, :]
    a = tl.load(start, mask=known[:, None] & inside, other=0.0)
    total = tl.zeros([RANKS, COLUMNS], tl.float32)
    share = tl.cdiv(rows, SPLITS * ROWS) * ROWS
    for first in range(split * share, tl.minimum(rows, (split + 1) * share), ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside
        gate_at = both + row.to(tl.int64)[:, None] * both_stride + at[None, :]
        narrow = tl.load(gate_at, mask=mask, other=0.0)
        up = tl.load(gate_at + columns, mask=mask, other=0.0).to(tl.float32)
        dh_at = dh + row.to(tl.int64)[:, None] * columns + at[None, :]
        grad = tl.load(dh_at, mask=mask, other=0.0).to(tl.float32)
        low_at = low + row[:, None] * ranks + rank[None, :]
        z = tl.load(low_at, mask=(row < rows)[:, None] & known[None, :], other=0.0)
        grad = tl.dot(z, a, grad, input_precision="ieee")
        wide = narrow.to(tl.float32)
        sigmoid = tl.sigmoid(wide)
        silu = (wide * sigmoid).to(narrow.dtype).to(tl.float32)
        h = (silu * up).to(narrow.dtype)
        dgate = grad * up * sigmoid * (1 + wide * (1 - sigmoid))
        tl.store(gate_at, dgate.to(narrow.dtype), mask=mask)
        tl.store(gate_at + columns, (grad * silu).to(narrow.dtype), mask=mask)
        total = tl.dot(tl.trans(z), h, total, input_precision="ieee")
    start = sums + (split * ranks + rank).to(tl.int64)[:, None] * columns + at[None, :]
    tl.store(start, total, mask=known[:, None] & inside)


def fits(ranks: int) -> bool:
    """Whether the gradient of factors of these ranks stays in registers."""
    return 0 < ranks <= MOST_RANKS


def gated_backward(dh: Tensor, both: Tensor, low: Tensor, factors: Tensor) -> Tensor:
    """What `ops.gated_backward` gives, in float32; `dh` keeps its values."""
    rows, columns = dh.shape
    ranks = low.shape[1]
    kind: dict[str, Any] = {"dtype": torch.float32, "device": dh.device}
    sums = torch.empty(SPLITS, ranks, columns, **kind)
    _gated_backward_kernel[(triton.cdiv(columns, COLUMNS), SPLITS)](
        dh, both, low, factors, sums, rows, columns,
        both.stride(0), factors.stride(0), ranks,
        RANKS=max(16, triton.next_power_of_2(ranks)),
        ROWS=ROWS, COLUMNS=COLUMNS, SPLITS=SPLITS, num_warps=WARPS,
    )  # fmt: skip
    return sums.sum(0)
