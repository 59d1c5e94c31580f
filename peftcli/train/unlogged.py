"""Figures of a step on their way from the GPU."""

from __future__ import annotations

import torch

from peftcli.train.clock import mark


class Unlogged:
    """Loss and gradient norm of one step, copied to the host without waiting for the GPU."""

    def __init__(
        self,
        step: int,
        epoch: float | None,
        learning_rate: float,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
    ) -> None:
        self.step, self.epoch, self.learning_rate = step, epoch, learning_rate
        norm = torch.as_tensor(float("nan") if grad_norm is None else grad_norm).to(loss.device)
        figures = torch.stack([loss.detach().float(), norm.detach().float()])
        self._figures = figures
        if figures.is_cuda:
            self._figures = torch.empty(2, pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
        self.mark = mark(figures.device)
        """The end of the step, and of that copy."""

    def read(self) -> dict[str, float]:
        """What the trainer logs of the step; waits until the step is done."""
        if self.mark.event is not None:
            self.mark.event.synchronize()
        loss, norm = self._figures.tolist()
        return {"loss": loss, "grad_norm": norm, "learning_rate": self.learning_rate}
