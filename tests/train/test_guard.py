"""A bad step that the optimizer's own kernel leaves out, on the device."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.optim import AdamW as PagedAdamW
from torch import nn

from peftcli.train.guard import Guard
from peftcli.train.unlogged import Unlogged

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Guarded:
    """One parameter, its optimizer, and a guard."""

    def __init__(self, device: str, *, guarded: bool = True) -> None:
        self.device = torch.device(device)
        self.parameter = nn.Parameter(torch.linspace(-1, 1, 7, device=device))
        values = [self.parameter]
        self.optimizer = torch.optim.AdamW(values, lr=0.1, weight_decay=0.1, fused=True)
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
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (2.0, math.nan)])
def test_a_guarded_optimizer_leaves_out_a_bad_step(device: str, loss: float, norm: float) -> None:
    one = Guarded(device)
    for _ in range(3):
        one.step(0.5)
    before = one.held()
    one.step(math.nan, loss, norm)
    one.step(0.5)  # began before anybody knew
    assert same(before, one.held())


@pytest.mark.parametrize("device", DEVICES)
def test_a_guard_changes_no_good_step(device: str) -> None:
    found = []
    for guarded in (False, True):
        one = Guarded(device, guarded=guarded)
        for gradient in (0.5, -0.25, 3e10):
            one.step(gradient, loss=3e38, norm=3e38)  # their sum would not be finite
        found.append(one.held())
    assert same(*found)


def test_optimizers_that_obey_no_guard() -> None:
    values = [nn.Parameter(torch.ones(3))]
    assert Guard.fits(torch.optim.AdamW(values, fused=True))
    assert not Guard.fits(torch.optim.AdamW(values))
    assert not Guard.fits(torch.optim.SGD(values))
    assert not Guard.fits(PagedAdamW(values, is_paged=True))


@pytest.mark.parametrize("device", DEVICES)
def test_figures_stay_what_they_were(device: str) -> None:
    """Their tensors are zeroed and used again by the step that follows."""
    loss, norm = torch.tensor(2.5, device=device), torch.tensor(0.5, device=device)
    entry = Unlogged(3, 0.1, 1e-4, loss, norm)
    loss.zero_()
    norm.zero_()
    assert entry.read() == {"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-4}
