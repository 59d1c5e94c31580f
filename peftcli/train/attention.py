"""Causal attention over rows that lie end to end, each apart from the others.

Rows of any length share one sequence without padding; `cu_seq_lens` says where each begins and
ends. On a GPU this is PyTorch's own variable-length flash attention (Dao, 2023, arXiv 2307.08691),
on a CPU one call of SDPA a row. Registered with transformers under `NAME`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "peftcli_varlen"


def rows_apart(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """(tokens x heads x width) queries, keys and values -> the same shape as the queries.

    `cu_seq_lens` (int32, rows + 1) are the row borders; fewer key heads than query heads are
    shared; `window` limits how many tokens back a token looks, itself counted.
    """
    if window is not None and window >= longest:
        window = None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        out: Tensor = _Flash.apply(query, key, value, cu_seq_lens, longest, scale, window, dropout)
        return out
    borders = cu_seq_lens.tolist()
    parts = [
        _one_row(query[a:b], key[a:b], value[a:b], scale, window, dropout)
        for a, b in pairwise(borders)
        if b > a
    ]
    return torch.cat(parts)


def _one_row(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, dropout: float
) -> Tensor:
    mask = None
    if window is not None:
        at = torch.arange(len(query), device=query.device)
        back = at[:, None] - at[None, :]
        mask = (back >= 0) & (back < window)
    out = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


class _Flash(torch.autograd.Function):
    """The ATen operators themselves, which share key heads; the public wrapper does not yet."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float,
        window: int | None, dropout: float,
    ) -> Any:  # fmt: skip
        left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, dropout, True, False, scale=scale, **left
        )
        ctx.save_for_backward(q, k, v, cu, out, lse, rng, unused)
        ctx.longest, ctx.scale, ctx.left, ctx.dropout = longest, scale, left, dropout
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, cu, out, lse, rng, unused = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, cu, cu, ctx.longest, ctx.longest,
            ctx.dropout, True, rng, unused, scale=ctx.scale, **ctx.left,
        )  # fmt: skip
        return dq, dk, dv, *[None] * 5


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: heads before tokens in, tokens before heads out."""
    rows, length = query.shape[0], query.shape[2]
    if cu_seq_lens_q is None and sliding_window is not None and sliding_window < length:
        cu_seq_lens_q = borders_of(rows, length, query.device)
        max_length_q = length
    if cu_seq_lens_q is None or max_length_q is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = rows_apart(q, k, v, cu_seq_lens_q, max_length_q, scale, sliding_window, dropout)
    return out.unflatten(0, (rows, length)), None


def borders_of(rows: int, length: int, device: torch.device) -> Tensor:
    """`cu_seq_lens` of equally long rows."""
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)


def register() -> None:
    """Let `attn_implementation=NAME` mean the function above.

    No mask function goes with it, so transformers builds no mask: rows are causal, and padding on
    the right is never looked at by what lies left of it. Not for generation with left padding.
    """
    AttentionInterface.register(NAME, attention_forward)
