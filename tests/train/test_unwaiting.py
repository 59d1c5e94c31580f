"""bitsandbytes' steps without its waits: the same steps, and states that are whole when read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.optim.optimizer as theirs
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bitsandbytes.optim import (
    AdamW,
    AdamW8bit,
    GlobalOptimManager,
    Lion,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion8bit,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from peftcli.train.flat import forget_settings
from peftcli.train.unwaiting import from_bitsandbytes, without_waits

KINDS = [AdamW, AdamW8bit, Lion, PagedAdamW, PagedAdamW8bit, PagedLion8bit]
WRAPPED = ["bare", "scheduler", "accelerate", "scaler"]
PAGED = 200_000  # values; from 100,000 on bitsandbytes pages states


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every parameter that bitsandbytes waited for."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(theirs, "sync_gpu", found.append)
    return found


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


class Steps:
    """A few steps of one optimizer, of which one parameter often has no gradient."""

    def __init__(self, kind: Any, *, ours: bool, settings: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(70, 70), nn.Linear(70, 70, bias=False), nn.Linear(9, 9)
        )
        forget_settings()
        if settings:
            manager = GlobalOptimManager.get_instance()
            manager.register_module_override(self.model[1], "weight", {"optim_bits": 32})
        groups = [
            {"params": list(self.model[0].parameters()), "weight_decay": 0.1},
            {"params": [*self.model[1].parameters(), *self.model[2].parameters()], "lr": 3e-2},
        ]
        self.inner = kind(groups, lr=1e-2)
        if ours:
            without_waits(self.inner)
        self.optimizer: Any = self.inner
        self.after: Callable[[], None] = lambda: None

    def wrap(self, how: str, accelerator: Accelerator) -> Steps:
        if how == "accelerate":
            self.optimizer = accelerator.prepare(self.inner)
        if how == "scaler":
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
            accelerator.scaler.scale(torch.ones(()))  # without which it refuses to step
            self.optimizer = accelerator.prepare(self.inner)
        if how != "bare":
            self.after = LambdaLR(self.inner, lambda step: 1.0 / (1 + step)).step
        return self

    def take(self, steps: int = 5) -> list[torch.Tensor]:
        """Parameters and states after some steps."""
        generator = torch.Generator().manual_seed(1)
        for step in range(steps):
            for i, parameter in enumerate(self.model.parameters()):
                if i == 0 or (i + step) % 3:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()
            self.after()
            self.optimizer.zero_grad()
        return self.held()

    def held(self) -> list[torch.Tensor]:
        states = [self.inner.state[p] for p in self.model.parameters()]
        values = [torch.as_tensor(v) for state in states for v in state.values()]
        return [t.detach().clone() for t in (*self.model.parameters(), *values)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_are_bitsandbytes_own(
    kind: Any, how: str, waits: list[torch.Tensor], accelerator: Accelerator
) -> None:
    """Parameters and states, bit by bit; and nothing is waited for."""
    own = Steps(kind, ours=False).wrap(how, accelerator).take()
    assert waits
    waits.clear()
    steps = Steps(kind, ours=True).wrap(how, accelerator)
    assert same(own, steps.take())
    assert waits == []
    bits = {state["state1"].dtype for state in steps.inner.state.values()}
    assert (torch.uint8 in bits) == kind.__name__.endswith("8bit")


def test_settings_of_single_parameters_are_heeded(waits: list[torch.Tensor]) -> None:
    own = Steps(AdamW8bit, ours=False, settings=True).take()
    steps = Steps(AdamW8bit, ours=True, settings=True)
    assert same(own, steps.take())
    assert steps.inner.state[steps.model[1].weight]["state1"].dtype == torch.float32
    assert steps.inner.state[steps.model[0].weight]["state1"].dtype == torch.uint8
    forget_settings()


def test_settings_of_an_earlier_optimizer_are_gone() -> None:
    """bitsandbytes keeps them by the place and the `id` of a parameter."""
    Steps(AdamW8bit, ours=False, settings=True).take()
    steps = Steps(AdamW8bit, ours=False)
    steps.take()
    assert steps.inner.state[steps.model[1].weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_states_go_on(
    kind: Any, waits: list[torch.Tensor], tmp_path: Path
) -> None:
    """From either step to the other."""
    whole = Steps(kind, ours=False)
    whole.take()
    expected = whole.take()
    for writes, reads in ((True, True), (True, False), (False, True)):
        one, other = Steps(kind, ours=writes), Steps(kind, ours=reads)
        one.take()
        torch.save(one.inner.state_dict(), tmp_path / "states.pt")
        other.model.load_state_dict(one.model.state_dict())
        other.inner.load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
        waits.clear()
        assert same(expected, other.take())
        assert (waits == []) is reads


def test_hooks_are_called() -> None:
    steps, called = Steps(AdamW, ours=True), list[str]()
    steps.inner.register_step_pre_hook(lambda *_: called.append("before"))
    steps.inner.register_step_post_hook(lambda *_: called.append("after"))
    steps.take(2)
    assert called == ["before", "after"] * 2


def test_an_optimizer_of_other_parts_keeps_its_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    without_waits(optimizer)
    assert "step" not in vars(optimizer)
    assert not from_bitsandbytes(optimizer)
    assert from_bitsandbytes(Steps(PagedAdamW, ours=True).inner)


class Busy:
    """A paged optimizer of one parameter on a GPU that is still busy when a step begins."""

    def __init__(self, kind: Any, *, ours: bool = True) -> None:
        self.parameter = nn.Parameter(torch.linspace(-1, 1, PAGED, device="cuda"))
        self.optimizer = kind([self.parameter], lr=1e-2)
        if ours:
            without_waits(self.optimizer)
        self.step()
        torch.cuda.synchronize()
        assert self.state().is_paged

    def state(self) -> Any:
        return self.optimizer.state[self.parameter]["state1"]

    def step(self) -> None:
        self.parameter.grad = self.parameter.detach().cos()
        self.optimizer.step()

    def step_when_busy(self) -> torch.cuda.Event:
        torch.cuda._sleep(2_000_000_000)  # cycles, about a second
        self.parameter.grad = self.parameter.detach().sin()  # changes the 8-bit codes as well
        self.optimizer.step()
        done = torch.cuda.Event()
        done.record()
        return done


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
@pytest.mark.parametrize("ours", [True, False])
def test_a_step_returns_while_the_gpu_is_busy(kind: Any, ours: bool) -> None:
    """Bitsandbytes' own does not, which shows that a wait would be seen."""
    assert Busy(kind, ours=ours).step_when_busy().query() is not ours


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_states_are_whole_when_they_are_saved(kind: Any, tmp_path: Path) -> None:
    """Those of the step that the GPU has not done yet when saving begins."""
    busy = Busy(kind)
    before = busy.state().clone()
    done = busy.step_when_busy()
    assert not done.query()
    torch.save(busy.optimizer.state_dict(), tmp_path / "states.pt")
    torch.cuda.synchronize()
    (saved,) = torch.load(tmp_path / "states.pt", weights_only=True)["state"].values()
    (saved,) = (value["state1"] for value in saved.values() if isinstance(value, dict))
    assert torch.equal(saved, busy.state())
    assert not torch.equal(saved, before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_the_steps_are_bitsandbytes_own_on_a_gpu(kind: Any) -> None:
    held = []
    for ours in (False, True):
        busy = Busy(kind, ours=ours)
        for _ in range(20):
            busy.step()
        torch.cuda.synchronize()
        held.append([busy.parameter.detach().clone(), busy.state().clone()])
    assert same(*held)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_loaded_states_are_paged_again(kind: Any, tmp_path: Path) -> None:
    """bitsandbytes itself leaves them in the GPU's memory."""
    one, held = Busy(kind), []
    torch.save(one.optimizer.state_dict(), tmp_path / "states.pt")
    for ours in (True, False):
        other = Busy(kind, ours=ours)
        other.parameter.data.copy_(one.parameter.data)
        other.optimizer = kind([other.parameter], lr=1e-2)
        if ours:
            without_waits(other.optimizer)
        other.optimizer.load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
        other.step()
        torch.cuda.synchronize()
        assert getattr(other.state(), "is_paged", False) is ours
        held.append([other.parameter.detach().cpu(), other.state().cpu()])
    assert same(*held)
