"""A step that must not be taken, left out by the GPU itself, so that nobody waits to look first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


class Guard:
    """Keeps a loss or gradient that is not finite from the parameters, in this step and all later.

    The kernels of a fused AdamW or SGD read the verdict on the device: parameters, moments and step
    counter stay as they are, bit for bit. Other optimizers read none. Their gradients become zero:
    parameters and moments stay finite, though momentum and weight decay move them. Nothing of that
    is kept: the host reads the figures of each step before it evaluates, saves or publishes
    anything, one step late at most; then the run fails, and leaves its last checkpoint.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._left_out = torch.zeros((), device=device)
        self._emptied: list[Tensor] = []
        if _obeys(optimizer):
            # What PyTorch's own gradient scaler hands over; 1 means: leave the step out.
            optimizer.found_inf = self._left_out  # type: ignore[attr-defined]
        else:
            self._emptied = [p for group in optimizer.param_groups for p in group["params"]]

    def judge(self, loss: Tensor, norm: Tensor) -> None:
        """Decide about the step that comes next; does not wait for the figures (scalars).

        Gradients that an optimizer gets as zeros must be those that it will read, clipped already:
        clipping by a norm that is not finite spreads it.
        """
        fine = torch.isfinite(loss) & torch.isfinite(norm)
        self._left_out.masked_fill_(~fine, 1.0)
        if self._emptied:
            self._empty(self._left_out.bool())

    def _empty(self, bad: Tensor) -> None:
        for parameter in self._emptied:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(bad, 0.0)  # a product would keep NaN


def _obeys(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself leaves a step out."""
    able = isinstance(optimizer, Adam | AdamW | SGD)
    return able and all(group["fused"] for group in optimizer.param_groups)
