"""Trained parameters as one tensor, for optimizers that go through them one by one.

bitsandbytes launches a kernel and waits for the GPU once for each parameter, and pages only states
of 100,000 values and more. Over one flat tensor that is one launch, one wait, and all of it paged.
States in 8 bits are quantised in blocks that then cross the borders of parameters.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn


class FlatParameters:
    """The parameters of an optimizer's groups as views of one tensor a group, gradients too."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        for group in optimizer.param_groups:
            if group["params"]:
                group["params"] = [self._flatten(group["params"])]

    def attach_gradients(self) -> None:
        """Zero all gradients and let the backward pass add to the flat ones."""
        for flat, gradient in self._gradients:
            gradient.zero_()
            flat.grad = gradient  # gone when the last step was left out
        for parameter, view in self._views:
            parameter.grad = view

    def _flatten(self, parameters: list[nn.Parameter]) -> nn.Parameter:
        flat = nn.Parameter(torch.cat([p.data.flatten() for p in parameters]))
        ends = list(accumulate(p.numel() for p in parameters))
        parts = [slice(end - p.numel(), end) for p, end in zip(parameters, ends, strict=True)]
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = flat.data[part].view(parameter.shape)
        gradient = torch.zeros_like(flat)  # now that the parameters' own memory is free
        for parameter, part in zip(parameters, parts, strict=True):
            self._views.append((parameter, gradient[part].view(parameter.shape)))
        flat.grad = gradient
        self._gradients.append((flat, gradient))
        return flat
