"""Rows of token ids -> one padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Collator:
    """Pads on the right; packed rows get positions that start anew at each row.

    Returns `input_ids` and `labels` (int64, rows x longest) with `attention_mask`, or, for packed
    rows, with `position_ids` from which transformers builds a block-diagonal mask.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, -100, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        packed = "seq_lengths" in rows[0]
        positions = torch.zeros(shape, dtype=torch.int64)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = torch.as_tensor(row["input_ids"])
            labels[i, :length] = torch.as_tensor(row["labels"])
            mask[i, :length] = 1
            if packed:
                # The padding is a sequence of its own, so that no row looks at it.
                lengths = [*row["seq_lengths"], longest - length]
                positions[i] = torch.cat([torch.arange(n) for n in lengths])
                labels[i, positions[i] == 0] = -100
        labels[:, 0] = -100  # nothing before it predicts a first token
        if packed:
            return {"input_ids": input_ids, "labels": labels, "position_ids": positions}
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
