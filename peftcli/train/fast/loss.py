"""The loss of a frozen output head, without ever holding all logits.

Logits exist for a few rows at a time; their gradient replaces them in place and is taken back to
the hidden states at once, in the forward pass. Two products instead of the three that
recomputing the logits in the backward pass would need.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftcli.train.fast import ops

TILE_BYTES = 256 * 2**20
PARTS, FEWEST = 4, 512
"""Tiles of a short micro-batch, so that its logits are no more than the rest; and rows of a tile
below which the products would be slow."""


class HeadLoss(torch.autograd.Function):
    """Sum of the losses of trained rows, times `scale`: (rows x hidden), (out x hidden) -> scalar.

    `trained` (int64) are the rows whose next token counts, `targets` (int64) those tokens, `scale`
    a scalar tensor such as 1 / trained tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, trained: Tensor, targets: Tensor, scale: Tensor
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.zeros_like(hidden) if needs_gradient else None
        rows = tile_rows(head, len(hidden))
        for index, target in zip(
            torch.split(trained, rows), torch.split(targets, rows), strict=True
        ):
            if not len(index):
                continue
            logits = hidden[index] @ head.T
            total += ops.cross_entropy_(logits, target, scale if needs_gradient else None).sum()
            if gradient is not None:
                gradient[index] = logits @ head
            del logits  # before the next tile is made, not after
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None


def tile_rows(head: Tensor, tokens: int) -> int:
    """Rows of logits held at a time, of `tokens` in all."""
    most = TILE_BYTES // (head.shape[0] * head.element_size())
    wanted = max(FEWEST, -(-tokens // PARTS))
    return min(max(64, most // 64 * 64), -(-wanted // 64) * 64)
