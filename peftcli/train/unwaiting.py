"""Steps of bitsandbytes' optimizers that do not wait for the GPU, and page states again.

bitsandbytes waits after each parameter and once more at the end, so that the host may read paged
states, which lie in memory that it shares with the GPU, at any moment. Between steps nobody does.
Prefetches, updates and all other work of a run go to the GPU's default stream, which does one after
the other. So it is enough to wait where the host reads the states: whoever saves them asks for
`state_dict`. Nor does the host touch them at any other time, which it must not while the GPU is at
work where the two cannot share memory at the same moment (Windows, WSL).

States that were loaded would stay in the GPU's own memory, so that a resumed run needs more of it
than the run that it goes on with; they are paged again before the first step.
"""

from __future__ import annotations

from collections import defaultdict
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

STATES = {"state1", "state2"}  # as large as their parameter; what else there is stays small


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

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros like `p`, paged where that is worth it; waits until they are."""

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
        _page_again(optimizer)
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


def _page_again(optimizer: Parts) -> None:
    """Put states that were loaded where `init_state` would have made them."""
    for parameter, state in optimizer.state.items():
        for name in STATES & state.keys():
            loaded = state[name]
            state[name] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
            state[name].copy_(loaded)


def _wait(optimizer: Optimizer) -> None:
    """Until the GPU has written the states that are about to be read."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
