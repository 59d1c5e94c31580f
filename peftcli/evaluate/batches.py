"""Rows of different lengths -> batches of similar length within a token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peftcli.errors import ResourceError
from peftcli.models import Device

LOGITS_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
FORWARD_TOKENS = {"cuda": 16384, "cpu": 2048}


def forward_tokens(device: Device, vocabulary: int, wanted: int | None) -> int:
    """Tokens of a forward pass whose logits stay within LOGITS_BYTES."""
    if wanted is not None:
        return wanted
    bytes_each = vocabulary * (4 if device.dtype == "float32" else 2)
    return max(256, min(FORWARD_TOKENS[device.kind], LOGITS_BYTES[device.kind] // bytes_each))


def batches(lengths: Sequence[int], tokens: int, most_rows: int = 512) -> list[list[int]]:
    """Row numbers, longest rows first, in batches whose padded size is at most `tokens`."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    for row in order:
        longest = lengths[found[-1][0]] if found else 0
        if found and (len(found[-1]) + 1) * longest <= tokens and len(found[-1]) < most_rows:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def halving(work: Callable[[list[int]], None], rows: list[int]) -> None:
    """Do `work` on the rows, on half of them at a time where the GPU's memory is too small."""
    try:
        work(rows)
        return
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise ResourceError(
                "the GPU ran out of memory on a single row",
                "write a smaller data.max_length, or use a larger GPU",
            ) from None
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    halving(work, rows[:middle])
    halving(work, rows[middle:])


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
