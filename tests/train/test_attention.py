"""Attention where flash attention does not run: cards before Ampere, and float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftcli.train import attention

BORDERS = (0, 5, 14, 21)


def states(heads: int, shared: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """(tokens x heads x width) queries, keys and values."""
    torch.manual_seed(0)
    made = [torch.randn(BORDERS[-1], n, 16).to(dtype) for n in (heads, shared, shared)]
    return [x.to(device).requires_grad_() for x in made]


def by_hand(query: Any, key: Any, value: Any, window: int | None) -> torch.Tensor:
    """The definition, in float64, row by row."""
    each = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(each, 0) for x in (k, v))
    at = torch.arange(BORDERS[-1], device=query.device)
    row = torch.bucketize(at, torch.tensor(BORDERS[1:], device=query.device), right=True)
    back = at[:, None] - at
    seen = (row[:, None] == row) & (back >= 0) & (back < (window or BORDERS[-1]))
    scores = (q @ k.transpose(1, 2) / 4).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def check(dtype: torch.dtype, device: str, window: int | None, limit: float) -> None:
    found, wanted = (states(8, 2, dtype, device) for _ in range(2))
    borders = torch.tensor(BORDERS, dtype=torch.int32, device=device)
    out = attention.rows_apart(*found, borders, 9, 0.25, window)
    expected = by_hand(*wanted, window)
    torch.testing.assert_close(out.double(), expected, atol=limit, rtol=limit)
    direction = torch.randn_like(expected)
    out.backward(direction.to(dtype))
    expected.backward(direction)
    for x, y in zip(found, wanted, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad.double(), atol=limit, rtol=limit)


@pytest.mark.parametrize("window", [None, 4])
def test_rows_with_shared_key_heads_on_a_cpu(window: int | None) -> None:
    check(torch.float32, "cpu", window, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-2), (torch.float32, 1e-3)])
def test_no_kernel_that_holds_all_scores_is_needed(
    monkeypatch: pytest.MonkeyPatch, window: int | None, dtype: torch.dtype, limit: float
) -> None:
    monkeypatch.setattr(attention, "FLASH_FROM", 999)  # above this card
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        check(dtype, "cuda", window, limit)
