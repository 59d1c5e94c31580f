"""Head norms and rotation of queries and keys in one pass over memory each way (Qwen3).

Imported on CUDA only, like `triton_ops`. A program takes all heads of a token, so that rows as
narrow as a head are read side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turned(a, b, c, s, SIGN: tl.constexpr):
    """Halves of rows after rotation, in float32."""
    return a * c - SIGN * b * s, b * c + SIGN * a * s


@triton.jit
def _weighted(wide, scale, weight, narrow):
    """A norm's output, rounded as transformers rounds it to the dtype of `narrow`."""
    normed = (wide * scale).to(narrow.dtype).to(tl.float32)
    return (normed * weight).to(narrow.dtype).to(tl.float32)


@triton.jit
def _rope_normed_kernel(
    q, k, q_out, k_out, q_rstd, k_rstd, q_weight, k_weight, cos, sin, rope_stride,
    q_stride, k_stride, q_out_stride, k_out_stride, q_heads, k_heads, q_epsilon, k_epsilon,
    HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    is_key = tl.program_id(1) == 1
    states, out, rstd, weight = q, q_out, q_rstd, q_weight
    if is_key:
        states, out, rstd, weight = k, k_out, k_rstd, k_weight
    heads = tl.where(is_key, k_heads, q_heads)
    stride = tl.where(is_key, k_stride, q_stride)
    out_stride = tl.where(is_key, k_out_stride, q_out_stride)
    epsilon = tl.where(is_key, k_epsilon, q_epsilon)
    column, head = tl.arange(0, WIDTH), tl.arange(0, HEADS)
    inside = column < HALF
    mask = (head < heads)[:, None] & inside[None, :]
    within = head[:, None] * (2 * HALF) + column[None, :]
    start = states + row * stride + within
    first = tl.load(start, mask=mask, other=0.0)
    second = tl.load(start + HALF, mask=mask, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + epsilon)
    tl.store(rstd + row * heads + head, scale, mask=head < heads)
    low = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(weight + HALF + column, mask=inside, other=0.0).to(tl.float32)
    a = _weighted(a, scale[:, None], low[None, :], first)
    b = _weighted(b, scale[:, None], high[None, :], second)
    c = tl.load(cos + row * rope_stride + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + row * rope_stride + column, mask=inside, other=0.0).to(tl.float32)
    a, b = _turned(a, b, c[None, :], s[None, :], 1)
    at = out + row * out_stride + within
    tl.store(at, a.to(first.dtype), mask=mask)
    tl.store(at + HALF, b.to(first.dtype), mask=mask)


@triton.jit
def _rope_normed_backward_kernel(
    q, k, v, q_raw, k_raw, q_out, k_out, v_out, q_rstd, k_rstd, q_weight, k_weight,
    cos, sin, rope_stride, q_stride, k_stride, v_stride, q_raw_stride, k_raw_stride,
    q_out_stride, k_out_stride, v_out_stride, q_heads, k_heads,
    HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    grads, raw, out, rstd, weight = q, q_raw, q_out, q_rstd, q_weight
    if which == 1:
        grads, raw, out, rstd, weight = k, k_raw, k_out, k_rstd, k_weight
    if which == 2:
        grads, out = v, v_out
    heads = tl.where(which == 0, q_heads, k_heads)
    stride = tl.where(which == 0, q_stride, tl.where(which == 1, k_stride, v_stride))
    other = tl.where(which == 1, k_out_stride, v_out_stride)
    out_stride = tl.where(which == 0, q_out_stride, other)
    raw_stride = tl.where(which == 0, q_raw_stride, k_raw_stride)
    column, head = tl.arange(0, WIDTH), tl.arange(0, HEADS)
    inside = column < HALF
    mask = (head < heads)[:, None] & inside[None, :]
    within = head[:, None] * (2 * HALF) + column[None, :]
    start = grads + row * stride + within
    first = tl.load(start, mask=mask, other=0.0)
    second = tl.load(start + HALF, mask=mask, other=0.0)
    at = out + row * out_stride + within
    if which == 2:
        tl.store(at, first, mask=mask)
        tl.store(at + HALF, second, mask=mask)
    else:
        c = tl.load(cos + row * rope_stride + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + row * rope_stride + column, mask=inside, other=0.0).to(tl.float32)
        a, b = first.to(tl.float32), second.to(tl.float32)
        a, b = _turned(a, b, c[None, :], s[None, :], -1)
        low = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(weight + HALF + column, mask=inside, other=0.0).to(tl.float32)
        a = a.to(first.dtype).to(tl.float32) * low[None, :]
        b = b.to(first.dtype).to(tl.float32) * high[None, :]
        start = raw + row * raw_stride + within
        x = tl.load(start, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(start + HALF, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row * heads + head, mask=head < heads, other=0.0)
        dot = tl.sum(a * x + b * y, 1) / (2 * HALF)
        share = (scale * scale * dot)[:, None]
        scale = scale[:, None]
        tl.store(at, (scale * (a - x * share)).to(first.dtype), mask=mask)
        tl.store(at + HALF, (scale * (b - y * share)).to(first.dtype), mask=mask)


def rope_normed(
    heads: list[Tensor],
    weights: list[Tensor],
    epsilons: list[float],
    cos: Tensor,
    sin: Tensor,
    out: list[Tensor],
) -> list[Tensor]:
    """What `ops.rope_normed` does, in one launch."""
    (q, k), (q_out, k_out) = heads, out
    tokens, most, width = q.shape
    rstd = [cos.new_empty(x.shape[:2], dtype=torch.float32) for x in heads]
    _rope_normed_kernel[(tokens, 2)](
        q, k, q_out, k_out, *rstd, *weights, cos, sin, cos.stride(0),
        q.stride(0), k.stride(0), q_out.stride(0), k_out.stride(0), most, k.shape[1], *epsilons,
        **_tile(max(most, k.shape[1]), width),
    )  # fmt: skip
    return rstd


def rope_normed_backward(
    grads: list[Tensor],
    raw: list[Tensor],
    weights: list[Tensor],
    rstd: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    out: list[Tensor],
) -> None:
    """What `ops.rope_normed_backward` does, in one launch."""
    tokens, most, width = grads[0].shape
    shared = grads[1].shape[1]
    strides = [x.stride(0) for x in (*grads, *raw, *out)]
    _rope_normed_backward_kernel[(tokens, 3)](
        *grads, *raw, *out, *rstd, *weights, cos, sin, cos.stride(0), *strides, most, shared,
        **_tile(max(most, shared), width),
    )  # fmt: skip


def _tile(heads: int, width: int) -> dict[str, Any]:
    """Constants of a kernel whose programs take so many heads of a token."""
    rows, columns = triton.next_power_of_2(heads), triton.next_power_of_2(width // 2)
    warps = 4 if rows * columns <= 2048 else 8  # 64 registers in bfloat16, going backward
    return {"HEADS": rows, "HALF": width // 2, "WIDTH": columns, "num_warps": warps}
