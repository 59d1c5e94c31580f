"""Causal attention over rows that lie end to end, each apart from the others.

Rows of any length share one sequence without padding; `cu_seq_lens` says where each begins and
ends. On a GPU this is PyTorch's own variable-length flash attention (Dao, 2023, arXiv 2307.08691),
on a CPU, on cards before Ampere, and in float32, one call of SDPA a row. Registered with
transformers under `NAME`.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftcli.estimate.gpus import FLASH_FROM

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
    if flash_runs(query):
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
    if window is not None and window < len(query):
        at = torch.arange(len(query), device=query.device)
        back = at[:, None] - at[None, :]
        mask = (back >= 0) & (back < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return causal(q, k, v, scale, mask, dropout)[0].transpose(0, 1)


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """SDPA over (rows x heads x tokens x width), causal where no mask says what a token sees.

    Fewer key heads than query heads are shared, or repeated where the kernels cannot share them.
    """
    key, value = (repeated(query, x) for x in (key, value))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def repeated(query: Tensor, key: Tensor) -> Tensor:
    """Keys or values with as many heads (dimension 1) as the queries, where they must have them.

    On a GPU only flash attention lets several query heads share a key head. Where it does not run,
    SDPA would take the kernel that holds the scores of all pairs of tokens.
    """
    shared = query.shape[1] // key.shape[1]
    if shared == 1 or not query.is_cuda or flash_runs(query):
        return key
    return key.repeat_interleave(shared, 1)


def flash_runs(x: Tensor) -> bool:
    """Whether PyTorch's flash attention computes on this tensor's device and dtype."""
    return x.is_cuda and x.element_size() == 2 and _compute(x.device) >= FLASH_FROM


@cache
def _compute(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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
        key, value = repeated(query, key), repeated(query, value)
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
