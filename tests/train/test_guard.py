"""A bad step that the optimizer's own kernel leaves out, or gets as zeros, on the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedLion8bit
from torch import nn
from torch.nn.utils import clip_grad_norm_

from peftcli.train.flat import FlatParameters
from peftcli.train.guard import Guard
from peftcli.train.unlogged import Unlogged
from peftcli.train.unwaiting import without_waits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FUSED = [torch.optim.AdamW, torch.optim.SGD]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Guarded:
    """One parameter, a fused optimizer, and a guard."""

    def __init__(self, device: str, kind: Any, *, guarded: bool = True) -> None:
        self.device = torch.device(device)
        self.parameter = nn.Parameter(torch.linspace(-1, 1, 7, device=device))
        self.optimizer = kind([self.parameter], lr=0.1, weight_decay=0.1, fused=True)
        self.guard = Guard(self.optimizer, self.device) if guarded else None

    def step(self, gradient: float, loss: float = 2.0, norm: float = 1.0) -> None:
        if self.guard is not None:
            figures = torch.tensor([loss, norm], device=self.device)
            self.guard.judge(figures[0], figures[1])
        self.parameter.grad = torch.full_like(self.parameter, gradient)
        self.optimizer.step()

    def held(self) -> list[torch.Tensor]:
        state = self.optimizer.state[self.parameter].values()
        return [t.detach().clone() for t in (self.parameter, *state)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (2.0, math.nan)])
def test_a_guarded_optimizer_leaves_out_a_bad_step(
    device: str, kind: Any, loss: float, norm: float
) -> None:
    one = Guarded(device, kind)
    for _ in range(3):
        one.step(0.5)
    before = one.held()
    one.step(math.nan, loss, norm)
    one.step(0.5)  # began before anybody knew
    assert same(before, one.held())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", FUSED)
def test_a_guard_changes_no_good_step(device: str, kind: Any) -> None:
    found = []
    for guarded in (False, True):
        one = Guarded(device, kind, guarded=guarded)
        for gradient in (0.5, -0.25, 3e10):
            one.step(gradient, loss=3e38, norm=3e38)  # their sum would not be finite
        found.append(one.held())
    assert same(*found)


class Emptied:
    """Two layers under an optimizer of bitsandbytes, as the trainer steps them."""

    def __init__(self, device: str, kind: Any, *, guarded: bool = True) -> None:
        torch.manual_seed(0)
        # One is joined with the biases, one is too large for that.
        self.model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 2**16)).to(device)
        self.optimizer = kind(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.flat = FlatParameters(self.optimizer)
        without_waits(self.optimizer)
        self.stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.guard = Guard(self.optimizer, torch.device(device)) if guarded else None
        self.rows = torch.randn(5, 70, generator=torch.Generator().manual_seed(1)).to(device)

    def step(self, spoil: float = 1.0, *, empty: bool = False) -> None:
        """One step; its gradient times `spoil` in one place, or nothing but zeros."""
        self.flat.release()
        self.model.zero_grad()
        self.model(self.rows).square().sum().backward()
        self.model[0].bias.grad[3] *= spoil
        self.flat.gather()
        norm = clip_grad_norm_(self.stepped, 1.0)
        if empty:
            for parameter in self.stepped:
                parameter.grad.zero_()
        if self.guard is not None:
            self.guard.judge(norm.new_ones(()), norm)
        self.optimizer.step()

    def held(self) -> list[torch.Tensor]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        states = [self.optimizer.state[p] for p in self.stepped]
        values = [torch.as_tensor(v) for state in states for v in state.values()]
        return [t.detach().clone() for t in (*self.model.parameters(), *values)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [PagedAdamW, AdamW8bit, PagedLion8bit])
@pytest.mark.parametrize("spoil", [math.nan, math.inf])
@pytest.mark.parametrize("good", [0, 3])
def test_bitsandbytes_gets_zeros_from_a_bad_step_on(
    device: str, kind: Any, spoil: float, good: int
) -> None:
    """In every parameter that it steps; the bad step may be the first one."""
    one, other = Emptied(device, kind), Emptied(device, kind, guarded=False)
    for _ in range(good):
        one.step()
        other.step()
    assert same(one.held(), other.held())
    one.step(spoil)
    one.step()  # began before anybody knew
    for _ in range(2):
        other.step(empty=True)
    assert same(one.held(), other.held())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in one.held())


@pytest.mark.parametrize("device", DEVICES)
def test_figures_stay_what_they_were(device: str) -> None:
    """Their tensors are zeroed and used again by the step that follows."""
    loss, norm = torch.tensor(2.5, device=device), torch.tensor(0.5, device=device)
    entry = Unlogged(3, 0.1, 1e-4, loss, norm)
    loss.zero_()
    norm.zero_()
    assert entry.read() == {"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-4}
