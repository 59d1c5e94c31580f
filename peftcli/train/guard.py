"""A step that must not be taken, left out by the GPU itself, so that nobody waits to look first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer


class Guard:
    """Keeps a fused AdamW from using a loss or gradient that is not finite.

    The optimizer's kernel reads the verdict on the device: parameters, moments and step counter
    stay as they are, bit for bit. Later steps are left out too, until the run has stopped.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._left_out = torch.zeros((), device=device)
        # What PyTorch's own gradient scaler hands over; 1 means: leave the step out.
        optimizer.found_inf = self._left_out  # type: ignore[attr-defined]

    @staticmethod
    def fits(optimizer: Optimizer) -> bool:
        """Whether the optimizer obeys; others would move by momentum and weight decay alone."""
        adam = isinstance(optimizer, Adam | AdamW)
        return adam and all(group["fused"] for group in optimizer.param_groups)

    def judge(self, loss: Tensor, norm: Tensor) -> None:
        """Decide about the step that comes next; does not wait for the figures (scalars)."""
        fine = torch.isfinite(loss) & torch.isfinite(norm)
        self._left_out.masked_fill_(~fine, 1.0)
