"""Figures that are read while the next step runs: the same run, and no bad step gets further."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW as PagedAdamW
from poison import poison
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaModel, TrainerCallback

from peftcli.errors import NumericalError
from peftcli.events import Event, Step
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.train import attempt, checkpoints
from peftcli.train.build import build_trainer
from peftcli.train.guard import Guard
from peftcli.train.run import Options, run
from peftcli.train.trainer import RecipeTrainer
from peftcli.train.unlogged import Unlogged

Late = Callable[[], "Held"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def recipe(
    base: Path, rows: Path, output: Path, share: float | None = None, **training: object
) -> LoadedRecipe:
    steps: dict[str, object] = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-2}
    steps |= {"save_steps": 5, "device": "cpu"}
    values = {
        "model": str(base),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(rows), "eval": share, "max_length": 64},
        "training": steps | training,
        "evaluation": {"steps": 5} if share else {},
        "output": str(output),
    }
    return validate(Document("test.yaml", values))


class Held(TrainerCallback):  # type: ignore[misc]
    """What parameters and optimizer were before each step."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer
        self.before: dict[int, list[torch.Tensor]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before[state.global_step + 1] = self.now()

    def now(self) -> list[torch.Tensor]:
        states = self.trainer.optimizer.state.values()
        trained = [p.detach() for p in self.trainer.model.parameters() if p.requires_grad]
        return [t.clone() for t in (*trained, *(t for state in states for t in state.values()))]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    """The real trainer reads late on any device; gives what the last one held."""
    built: list[Held] = []

    def build(*arguments: Any) -> RecipeTrainer:
        trainer = build_trainer(*arguments)
        trainer.late = True
        built.append(Held(trainer))
        trainer.add_callback(built[-1])
        return trainer

    monkeypatch.setattr(attempt, "build_trainer", build)
    return lambda: built[-1]


def lines(output: Path) -> list[dict[str, Any]]:
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    found = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: line.get(key) for key in keys} for line in found]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


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


def test_figures_stay_what_they_were() -> None:
    """Their tensors are zeroed and used again by the step that follows."""
    loss, norm = torch.tensor(2.5), torch.tensor(0.5)
    entry = Unlogged(3, 0.1, 1e-4, loss, norm)
    loss.zero_()
    norm.zero_()
    assert entry.read() == {"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-4}


def test_a_run_that_reads_late_is_the_same_run(
    base_model: Path, rows: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every figure, the schedule, the evaluations and the weights, also after a resume."""
    outputs = []
    for name in ("at-once", "late"):
        if name == "late":
            request.getfixturevalue("late")
        outputs.append(tmp_path / name)
        run(recipe(base_model, rows, tmp_path / name, 0.1), Options(), lambda event: None)
    one, other = outputs
    assert lines(one) == lines(other)
    assert [line["step"] for line in lines(one) if line["eval_loss"] is None] == [*range(1, 13)]
    weights = adapter(one / "adapter")
    assert all(torch.equal(t, adapter(other / "adapter")[name]) for name, t in weights.items())
    last = other / "checkpoints" / "checkpoint-12"
    manifest = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    (last / "adapter_model.safetensors").unlink()
    run(recipe(base_model, rows, other, 0.1), Options(resume=True), lambda event: None)
    assert lines(one) == lines(other)
    assert all(torch.equal(t, adapter(other / "adapter")[name]) for name, t in weights.items())


def bad_step(base: Path, rows: Path, output: Path) -> tuple[int, str]:
    """The step that a run which judges at once stops at, and what it says."""
    events: list[Event] = []
    with pytest.raises(NumericalError) as caught:
        run(recipe(base, rows, output), Options(), events.append)
    return max(event.step for event in events if isinstance(event, Step)), caught.value.message


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("save_steps", [1, 2, 50])
def test_a_bad_step_is_found_a_step_later(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    device: str,
    save_steps: int,
) -> None:
    """Parameters, moments and counters stay those of the last good step."""
    base = poison(base_model, rows, tmp_path / "poisoned")
    bad, message = bad_step(base, rows, tmp_path / "at-once")
    late, output, events = request.getfixturevalue("late"), tmp_path / "late", list[Event]()
    loaded = recipe(base, rows, output, save_steps=save_steps, device=device)
    with pytest.raises(NumericalError) as caught:
        run(loaded, Options(), events.append)
    assert f"at step {bad}: not finite; the step was not taken" in caught.value.message
    if device == "cpu":
        assert caught.value.message.replace(str(output), str(tmp_path / "at-once")) == message
    steps = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in steps] == [*range(1, bad + 1)]
    assert [math.isfinite(event.loss) for event in steps] == [True] * (bad - 1) + [False]
    due = bad % save_steps == 0  # before a checkpoint nothing is left unread
    assert late().trainer.state.global_step == (bad if due else bad + 1)
    assert same(late().before[bad], late().now())
    saved = checkpoints.steps(output / "checkpoints")
    assert max(saved, default=0) == (bad - 1) // save_steps * save_steps
    assert not (output / "adapter").exists()


def test_memory_that_runs_out_before_a_bad_step_was_looked_at(
    base_model: Path, rows: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The step before is judged first; nothing is rescued, and nothing made smaller."""
    base = poison(base_model, rows, tmp_path / "poisoned")
    bad, _ = bad_step(base, rows, tmp_path / "at-once")
    late, output = request.getfixturevalue("late"), tmp_path / "late"

    def full(module: nn.Module, inputs: object) -> None:
        if (
            isinstance(module, LlamaModel)
            and module.training
            and late().trainer.state.global_step == bad
        ):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = register_module_forward_pre_hook(full)
    loaded = recipe(base, rows, output, save_steps=50, on_oom="shrink")
    try:
        with pytest.raises(NumericalError, match=f"at step {bad}: not finite"):
            run(loaded, Options(), lambda event: None)
    finally:
        hook.remove()
    assert bad not in checkpoints.steps(output / "checkpoints")
