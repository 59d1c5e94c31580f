"""Triton kernels of the fast step: one pass over memory where eager PyTorch takes several.

Imported on CUDA only. Every kernel computes in float32 and has a plain twin in `ops`, which the
tests compare it with. Rows are tokens, columns are features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(x, weight, y, rstd, stride, columns, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    tl.store(rstd + row, scale)
    normed = (wide * scale).to(values.dtype).to(tl.float32)  # rounded as transformers rounds it
    scaled = normed * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * stride + at, scaled.to(values.dtype), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    dy, x, weight, rstd, skip, dx, columns, HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    grad = tl.load(dy + row * columns + at, mask=inside, other=0.0)
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row)
    scaled = grad.to(tl.float32) * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    dot = tl.sum(scaled * values, 0) / columns
    result = scale * (scaled - values * (scale * scale * dot))
    if HAS_SKIP:
        result += tl.load(skip + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * columns + at, result.to(grad.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> Tensor:
    """(rows x columns) -> normed rows in `out`; returns 1/rms of each row in float32."""
    rows, columns = x.shape
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block, warps = _row_shape(columns)
    _rms_norm_kernel[(rows,)](
        x, weight, out, rstd, out.stride(0), columns, epsilon, BLOCK=block, num_warps=warps
    )
    return rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, skip: Tensor | None
) -> Tensor:
    """Gradient of the norm's input, plus `skip`; overwrites `dy`."""
    rows, columns = x.shape
    block, warps = _row_shape(columns)
    _rms_norm_backward_kernel[(rows,)](
        dy, x, weight, rstd, skip, dy, columns,
        HAS_SKIP=skip is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dy


@triton.jit
def _swiglu_kernel(both, out, both_stride, stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    narrow = tl.load(both + row * both_stride + at, mask=inside, other=0.0)
    wide = narrow.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(narrow.dtype).to(tl.float32)
    up = tl.load(both + row * both_stride + columns + at, mask=inside, other=0.0)
    tl.store(out + row * stride + at, (silu * up.to(tl.float32)).to(narrow.dtype), mask=inside)


@triton.jit
def _swiglu_backward_kernel(dh, both, both_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    gate = both + row * both_stride + at
    narrow = tl.load(gate, mask=inside, other=0.0)
    up = tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dh + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    wide = narrow.to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    silu = (wide * sigmoid).to(narrow.dtype).to(tl.float32)
    dgate = grad * up * sigmoid * (1 + wide * (1 - sigmoid))
    tl.store(dh + row * columns + at, (silu * up).to(narrow.dtype), mask=inside)
    tl.store(gate, dgate.to(narrow.dtype), mask=inside)
    tl.store(gate + columns, (grad * silu).to(narrow.dtype), mask=inside)


def swiglu(both: Tensor, out: Tensor) -> None:
    """silu(gate) * up into `out`; `both` holds gate and up side by side."""
    rows, columns = out.shape
    grid = (rows, triton.cdiv(columns, 2048))
    strides = both.stride(0), out.stride(0)
    _swiglu_kernel[grid](both, out, *strides, columns, BLOCK=2048, num_warps=8)


def swiglu_backward(dh: Tensor, both: Tensor) -> None:
    """Overwrites the gradient of h with h, and gate and up with their gradients."""
    rows, columns = dh.shape
    grid = (rows, triton.cdiv(columns, 2048))
    _swiglu_backward_kernel[grid](dh, both, both.stride(0), columns, BLOCK=2048, num_warps=8)


@triton.jit
def _rope_kernel(
    q, k, v, q_out, k_out, v_out, cos, sin, rope_stride, q_stride, k_stride, v_stride,
    q_out_stride, k_out_stride, v_out_stride, q_heads, k_heads, SIGN: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    states, out = q, q_out
    if which == 1:
        states, out = k, k_out
    if which == 2:
        states, out = v, v_out
    heads = tl.where(which == 0, q_heads, k_heads)
    stride = tl.where(which == 0, q_stride, tl.where(which == 1, k_stride, v_stride))
    other = tl.where(which == 1, k_out_stride, v_out_stride)
    out_stride = tl.where(which == 0, q_out_stride, other)
    column = tl.arange(0, WIDTH)
    inside = column < HALF
    head = tl.arange(0, HEADS)
    within = head[:, None] * (2 * HALF + REST) + column[None, :]
    mask = (head < heads)[:, None] & inside[None, :]
    first = tl.load(states + row * stride + within, mask=mask, other=0.0)
    second = tl.load(states + row * stride + within + HALF, mask=mask, other=0.0)
    at = out + row * out_stride + within
    if REST > 0:
        known = (head < heads)[:, None] & (column < REST)[None, :]
        rest = tl.load(states + row * stride + within + 2 * HALF, mask=known, other=0.0)
        tl.store(at + 2 * HALF, rest, mask=known)
    if which == 2:
        tl.store(at, first, mask=mask)
        tl.store(at + HALF, second, mask=mask)
    else:
        c = tl.load(cos + row * rope_stride + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + row * rope_stride + column, mask=inside, other=0.0).to(tl.float32)
        c, s = c[None, :], s[None, :]
        a, b = first.to(tl.float32), second.to(tl.float32)
        tl.store(at, (a * c - SIGN * b * s).to(first.dtype), mask=mask)
        tl.store(at + HALF, (b * c + SIGN * a * s).to(first.dtype), mask=mask)


def rope(heads: list[Tensor], cos: Tensor, sin: Tensor, sign: int, out: list[Tensor]) -> None:
    """What `ops.rope` does, in one launch."""
    q, k, v = (*heads, heads[1])[:3]
    q_out, k_out, v_out = (*out, out[1])[:3]
    tokens, most, width = q.shape
    half = cos.shape[-1] // 2
    _rope_kernel[(tokens, len(heads))](
        q, k, v, q_out, k_out, v_out, cos, sin, cos.stride(0),
        q.stride(0), k.stride(0), v.stride(0), q_out.stride(0), k_out.stride(0), v_out.stride(0),
        most, k.shape[1],
        SIGN=sign, HEADS=triton.next_power_of_2(max(most, k.shape[1])), HALF=half,
        WIDTH=triton.next_power_of_2(max(half, width - 2 * half)), REST=width - 2 * half,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, scale,
    COLUMNS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * COLUMNS
    target = tl.load(targets + row)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(start + at, mask=at < COLUMNS, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, value)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - safe) + tl.exp(value - safe)
        highest = higher
    peak = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - peak), 0)
    log_total = peak + tl.log(total)
    tl.store(losses + row, log_total - tl.load(start + target).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before another warp overwrites it
        factor = tl.load(scale).to(tl.float32)
        for first in range(0, COLUMNS, BLOCK):
            at = first + tl.arange(0, BLOCK)
            narrow = tl.load(start + at, mask=at < COLUMNS, other=float("-inf"))
            share = tl.exp(narrow.to(tl.float32) - log_total)
            grad = (share - tl.where(at == target, 1.0, 0.0)) * factor
            tl.store(start + at, grad.to(narrow.dtype), mask=at < COLUMNS)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    """Loss of each row in float32; with `scale`, logits become their gradient times it."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(rows,)](
        logits, targets, losses, scale,
        COLUMNS=columns, GRADIENT=scale is not None, BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return losses


def _row_shape(columns: int) -> tuple[int, int]:
    block = triton.next_power_of_2(columns)
    return block, min(16, max(1, block // 512))
