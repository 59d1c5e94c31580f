"""Small trained parameters as one tensor, for optimizers that go through them one by one.

bitsandbytes launches a kernel for each parameter, and pages only states of 100,000 values and more.
Over one flat tensor that is one launch, and all of it paged. States in 8 bits are quantised in
blocks that then cross the borders of parameters. Large parameters stay as they are: they are worth
a launch, and a copy of their gradients would be felt.
"""

from __future__ import annotations

import sys
from itertools import accumulate

import torch
from torch import Tensor, nn

LARGE = 2**22
"""Values of a parameter that stays alone."""


class FlatParameters:
    """The small parameters of an optimizer's groups as views of one tensor a group."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._flat: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        special = _with_settings_of_their_own()
        for group in optimizer.param_groups:
            alone = [p for p in group["params"] if p.numel() > LARGE or id(p) in special]
            kept = {id(p) for p in alone}
            small = [p for p in group["params"] if id(p) not in kept]
            kinds = dict.fromkeys(p.dtype for p in small)  # joined, they would all be the widest
            parts = [[p for p in small if p.dtype == kind] for kind in kinds]
            group["params"] = [*(self._flatten(part) for part in parts), *alone]

    def release(self) -> None:
        """Forget the last step's gradients, before the next step's activations need the room."""
        for flat, _ in self._flat:
            flat.grad = None

    def gather(self) -> None:
        """Move the gradients into flat ones, after the backward pass; none if there are none."""
        for flat, parameters in self._flat:
            if all(p.grad is None for p in parameters):
                continue
            gradients = [_gradient(p).flatten() for p in parameters]
            flat.grad = torch.cat(gradients)
            for parameter, part in zip(parameters, _parts(flat.grad, parameters), strict=True):
                parameter.grad = part

    def _flatten(self, parameters: list[nn.Parameter]) -> nn.Parameter:
        flat = nn.Parameter(torch.cat([p.data.flatten() for p in parameters]))
        for parameter, part in zip(parameters, _parts(flat.data, parameters), strict=True):
            parameter.data = part
        self._flat.append((flat, parameters))
        return flat


def forget_settings() -> None:
    """Drop what an earlier optimizer of this process left with bitsandbytes, its model included."""
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    manager.module_weight_config_triple.clear()
    manager.pid2config.clear()  # by `id`, which another parameter may have by now
    manager.index2config.clear()  # by the place among an optimizer's parameters


def _with_settings_of_their_own() -> set[int]:
    """Embeddings that transformers gives 32-bit states under an 8-bit optimizer."""
    from bitsandbytes.optim import GlobalOptimManager

    found = GlobalOptimManager.get_instance().module_weight_config_triple
    return {id(getattr(module, name)) for module, name, _ in found}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _parts(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Views of `flat`, one after the other in the shapes of the parameters."""
    ends = list(accumulate(p.numel() for p in parameters))
    starts = [0, *ends[:-1]]
    return [
        flat[start:end].view(p.shape)
        for start, end, p in zip(starts, ends, parameters, strict=True)
    ]
