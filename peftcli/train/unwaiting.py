"""Steps of bitsandbytes' optimizers that do not wait for the GPU.

bitsandbytes waits after each parameter and once more at the end, so that the host may read paged
states, which lie in memory that it shares with the GPU, at any moment. Between steps nobody does.
Prefetches, updates and all other work of a run go to the GPU's default stream, which does one after
the other. So it is enough to wait where the host reads the states: whoever saves them asks for
`state_dict`. Nor does the host touch them at any other time, which it must not while the GPU is at
work where the two cannot share memory at the same moment (Windows, WSL).
"""

from __future__ import annotations

from collections import defaultdict
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer


@runtime_checkable
class Parts(Protocol):
    """What the step of bitsandbytes 0.50 is made of."""

    initialized: bool
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, dict[str, Any]]

    def check_overrides(self) -> None:
        """Take over the settings of single parameters."""

    def to_gpu(self) -> None:
        """Move states that were loaded."""

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make states of zero; waits until paged ones are."""

    def prefetch_state(self, p: Tensor) -> None:
        """Ask for paged states to come to the GPU."""

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Launch the kernel."""


def from_bitsandbytes(optimizer: Optimizer) -> bool:
    """Whether it is one of bitsandbytes' own; imports nothing."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def without_waits(optimizer: Optimizer) -> None:
    """Give a bitsandbytes optimizer a step without waits, before anything wraps its own.

    One that is made of other parts keeps its own step.
    """
    if not isinstance(optimizer, Parts):
        return
    optimizer.register_state_dict_pre_hook(_wait)
    step = Optimizer.profile_hook_step(_step)  # which calls the hooks, as for every optimizer
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


@torch.no_grad()
def _step(optimizer: Parts, closure: None = None) -> None:
    """What `Optimizer8bit.step` does, without waiting."""
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, i, j)
            optimizer.prefetch_state(parameter)
            optimizer.update_step(group, parameter, i, j)


def _wait(optimizer: Optimizer) -> None:
    """Until the GPU has written the states that are about to be read."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
