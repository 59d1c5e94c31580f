"""Rows of different lengths -> batches of similar length within a token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peftcli.errors import ResourceError
from peftcli.models import Device

LOGITS_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
FORWARD_TOKENS = {"cuda": 16384, "cpu": 2048}


def forward_tokens(device: Device, vocabulary: int, wanted: int | None) -> int:
    """Tokens of a forward pass whose logits stay within LOGITS_BYTES."""
    if wanted is not None:
        return wanted
    bytes_each = vocabulary * (4 if device.dtype == "float32" else 2)
    return max(256, min(FORWARD_TOKENS[device.kind], LOGITS_BYTES[device.kind] // bytes_each))


def each_batch(
    lengths: Sequence[int],
    tokens: int,
    work: Callable[[list[int]], None],
    most_rows: int = 512,
) -> None:
    """Do `work` on row numbers, longest rows first, in batches of at most `tokens` with padding.

    When the GPU's memory is too small, this and all later batches are halved.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        rows = order[start : start + max(1, min(most_rows, tokens // longest))]
        if _fits(work, rows):
            start += len(rows)
            continue
        torch.cuda.empty_cache()
        tokens = longest * (len(rows) // 2)


def _fits(work: Callable[[list[int]], None], rows: list[int]) -> bool:
    """Whether the work was done; the memory of a failed try is free again on return."""
    try:
        work(rows)
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise ResourceError(
                "the GPU ran out of memory on a single row",
                "write a smaller data.max_length, or use a larger GPU",
            ) from None
        return False
    return True


def padded(
    rows: Sequence[Sequence[int]], fill: int, device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, (rows, longest) int64."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        part = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[number, part] = torch.as_tensor(row, dtype=torch.int64)
        mask[number, part] = 1
    return ids.to(device), mask.to(device)
