"""Rows of token ids -> the micro-batches of one optimizer step.

An optimizer step always takes `batch_size` rows. Where rows can be kept apart they lie end to
end, without padding, in as few micro-batches as a budget of tokens allows; elsewhere they are
padded, `micro_batch_size` rows at a time. Either way the loss is that of the rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
IGNORED = -100


@dataclass(frozen=True)
class Batches:
    """A collator that gives every micro-batch of a step at once.

    Returns `micro_batches`, a list of dictionaries, and `trained_tokens`, the number of tokens of
    them all that count in the loss.
    """

    pad_token_id: int
    micro_batch_size: int
    longest: int
    """Tokens of the longest row there is."""
    apart: bool
    """Whether rows can lie end to end."""

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        make = end_to_end if self.apart else self._padded
        parts = self._fill(rows) if self.apart else self._cut(rows)
        micro_batches = [make(part, self.longest) for part in parts]
        trained = sum(len(batch["targets"]) for batch in micro_batches)
        return {"micro_batches": micro_batches, "trained_tokens": trained}

    def _fill(self, rows: list[Row]) -> list[list[Row]]:
        """First fit, longest first, into parts of at most micro_batch_size x longest tokens."""
        budget = self.micro_batch_size * self.longest
        parts: list[list[Row]] = []
        room: list[int] = []
        for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
            size = len(row["input_ids"])
            at = next((i for i, free in enumerate(room) if free >= size), len(room))
            if at == len(room):
                parts.append([])
                room.append(budget)
            parts[at].append(row)
            room[at] -= size
        return parts

    def _cut(self, rows: list[Row]) -> list[list[Row]]:
        step = self.micro_batch_size
        return [rows[i : i + step] for i in range(0, len(rows), step)]

    def _padded(self, rows: list[Row], _: int) -> dict[str, Any]:
        batch = padded(rows, self.pad_token_id)
        shifted = batch["labels"][:, 1:]
        return batch | {"targets": shifted[shifted != IGNORED]}


def end_to_end(rows: list[Row], longest: int) -> dict[str, Any]:
    """Rows without padding in one sequence; equally long ones of the full length side by side.

    `input_ids` and `position_ids` are (1 x tokens), or (rows x longest) where every row has
    `longest` tokens and is one text. `trained` are the flat positions whose next token counts,
    `targets` those tokens, `cu_seq_lens` (int32) the borders of the texts.
    """
    lengths = [int(n) for row in rows for n in row.get("seq_lengths", [len(row["input_ids"])])]
    ids = torch.cat([torch.as_tensor(row["input_ids"]) for row in rows])
    labels = torch.cat([torch.as_tensor(row["labels"]) for row in rows])
    sizes = torch.tensor(lengths)
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    labels[borders[:-1]] = IGNORED  # nothing before it predicts a first token
    trained = (labels != IGNORED).nonzero().squeeze(1) - 1
    batch: dict[str, Any] = {"trained": trained, "targets": labels[trained + 1]}
    if all(n == longest for n in lengths):
        shape = (len(lengths), longest)
        positions = torch.arange(longest)[None]
        return batch | {"input_ids": ids.view(shape), "position_ids": positions, "longest": longest}
    positions = torch.arange(len(ids)) - borders[:-1].repeat_interleave(sizes)
    return batch | {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "cu_seq_lens": borders.to(torch.int32),
        "longest": max(lengths),
    }


def padded(rows: list[Row], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `labels` (int64) and `attention_mask`, (rows x longest), padded on the right."""
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.as_tensor(row["input_ids"])
        labels[i, :length] = torch.as_tensor(row["labels"])
        mask[i, :length] = 1
    labels[:, 0] = IGNORED  # nothing before it predicts a first token
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch as arguments of a transformers model; its loss shifts the labels."""
    if "labels" in batch:
        return {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
    ids = batch["input_ids"]
    labels = torch.full_like(ids, IGNORED).flatten()
    labels[batch["trained"] + 1] = batch["targets"]
    inputs = {
        "input_ids": ids,
        "labels": labels.view(ids.shape),
        "position_ids": batch["position_ids"].expand(ids.shape),
    }
    if "cu_seq_lens" in batch:
        borders, longest = batch["cu_seq_lens"], batch["longest"]
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    return inputs
