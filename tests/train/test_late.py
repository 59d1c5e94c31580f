"""Figures that are read while the next step runs: the same run, and no bad step gets further."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from poison import poison
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaModel, Trainer, TrainerCallback

from peftcli.errors import ExitCode, NumericalError
from peftcli.events import Event, Note, Step
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.train import attempt, checkpoints
from peftcli.train.build import build_trainer
from peftcli.train.run import Options, run
from peftcli.train.setting import settle
from peftcli.train.trainer import RecipeTrainer

Late = Callable[[], "Held"]
GUARDED, EMPTIED = "adamw_torch_fused", "paged_adamw_32bit"
"""Leaves a bad step out, gets zeros instead."""
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
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # paged states are read by the host
        states = self.trainer.optimizer.state.values()
        trained = [p.detach() for p in self.trainer.model.parameters() if p.requires_grad]
        held = (torch.as_tensor(value) for state in states for value in state.values())
        return [tensor.clone() for tensor in (*trained, *held)]


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


def timeless(event: Event, output: Path) -> str:
    """An event without what the clock and the folder add to it."""
    if isinstance(event, Step):
        event = replace(event, tokens_per_second=0.0, memory_gib=0.0, remaining_seconds=0.0)
    return str(event).replace(str(output), "")


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("read_late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("device", DEVICES)
def test_seconds_are_those_at_which_the_step_had_ended(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    device: str,
    read_late: bool,
) -> None:
    """The second step's time is not found in the first one's line, which is written after it."""
    if read_late:
        request.getfixturevalue("late")
    slow, output = 0.4, tmp_path / "run"

    def pause(module: nn.Module, inputs: object) -> None:
        if isinstance(module, LlamaModel) and module.training:
            time.sleep(slow)

    loaded = recipe(base_model, rows, output, device=device, max_steps=2, micro_batch_size=4)
    hook = register_module_forward_pre_hook(pause)
    events: list[Event] = []
    try:
        result = run(loaded, Options(), events.append)
    finally:
        hook.remove()
    first, last = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    assert slow <= first["seconds"] <= last["seconds"] - slow
    assert last["seconds"] <= result.seconds
    shown = [event.tokens_per_second for event in events if isinstance(event, Step)]
    assert [round(rate, 1) for rate in shown] == [x["tokens_per_second"] for x in (first, last)]
    # From rates and times the length of the first step follows, and is what it took.
    in_first = (last["seconds"] - first["seconds"]) / (2 * shown[0] / shown[1] - 1)
    assert slow - 0.01 <= in_first <= first["seconds"] + 0.01
    assert result.tokens_per_second == shown[1]


def test_tokens_of_a_smaller_last_step_are_not_counted_as_a_whole_one(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    """Forty rows are two steps of 32 and 8, and with a batch of 64 one step of forty."""
    for batch, read in {32: (32, 40, 72, 80), 64: (40, 80, 120, 160)}.items():
        setting = settle(recipe(base_model, rows, tmp_path, batch_size=batch), lambda event: None)
        each = setting.prepared.report.train.tokens / 40
        found = [attempt.tokens_read(setting, step) / each for step in range(5)]
        assert found == pytest.approx([0, *read])


CASES: dict[str, dict[str, object]] = {
    "guarded": {},
    "emptied": {"optimizer": EMPTIED},
    "emptied in 8 bits": {"optimizer": "paged_adamw_8bit"},
    "emptied Adafactor": {"optimizer": "adafactor"},
    "guarded SGD": {"optimizer": "sgd"},
    "skipping": {"on_nonfinite": "skip"},
}


@pytest.mark.parametrize("training", CASES.values(), ids=CASES)
def test_a_run_that_reads_late_is_the_same_run(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    training: dict[str, Any],
) -> None:
    """Every figure, warning and event, the schedule and the weights, also after a resume."""
    one, other, told = tmp_path / "at-once", tmp_path / "late", []
    base = base_model
    if "on_nonfinite" in training:
        base = poison(base_model, rows, tmp_path / "poisoned")
    for output in (one, other):
        if output == other:
            request.getfixturevalue("late")
        events: list[Event] = []
        run(recipe(base, rows, output, 0.1, **training), Options(), events.append)
        told.append([timeless(e, output) for e in events if not isinstance(e, Note)])
    assert told[0] == told[1]
    assert lines(one) == lines(other)
    assert [line["step"] for line in lines(one) if line["eval_loss"] is None] == [*range(1, 13)]
    weights = adapter(one / "adapter")
    assert all(torch.equal(t, adapter(other / "adapter")[name]) for name, t in weights.items())
    last = other / "checkpoints" / "checkpoint-12"
    manifest = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    (last / "adapter_model.safetensors").unlink()
    run(recipe(base, rows, other, 0.1, **training), Options(resume=True), lambda event: None)
    assert lines(one) == lines(other)
    assert all(torch.equal(t, adapter(other / "adapter")[name]) for name, t in weights.items())


def test_a_checkpoint_in_which_sgd_was_not_fused_is_gone_on_from(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As earlier versions wrote them; the kernel that reads the guard's verdict is used again."""
    output, name = tmp_path / "run", "get_optimizer_cls_and_kwargs"
    loaded = recipe(base_model, rows, output, optimizer="sgd")
    with monkeypatch.context() as before:
        before.setattr(RecipeTrainer, name, staticmethod(Trainer.get_optimizer_cls_and_kwargs))
        run(loaded, Options(), lambda event: None)
    weights, last = adapter(output / "adapter"), output / "checkpoints" / "checkpoint-12"
    assert torch.load(last / "optimizer.pt")["param_groups"][0]["fused"] is None
    manifest = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    (last / "adapter_model.safetensors").unlink()
    late = request.getfixturevalue("late")
    run(loaded, Options(resume=True), lambda event: None)
    assert all(group["fused"] for group in late().trainer.optimizer.param_groups)
    found = adapter(output / "adapter")
    assert all(torch.allclose(t, found[key], atol=1e-7) for key, t in weights.items())


def bad_step(base: Path, rows: Path, output: Path) -> tuple[int, str]:
    """The step that a run which judges at once stops at, and what it says."""
    events: list[Event] = []
    with pytest.raises(NumericalError) as caught:
        run(recipe(base, rows, output), Options(), events.append)
    return max(event.step for event in events if isinstance(event, Step)), caught.value.message


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("save_steps", "optimizer"),
    [
        *((1, GUARDED), (2, GUARDED), (50, GUARDED)),
        *((1, EMPTIED), (2, EMPTIED), (50, EMPTIED), (50, "paged_lion_8bit")),
        *((50, "sgd"), (50, "adafactor"), (50, "adamw_torch")),
    ],
)
def test_a_bad_step_is_found_a_step_later(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    device: str,
    save_steps: int,
    optimizer: str,
) -> None:
    """Parameters, moments and counters stay those of the last good step, or at least finite."""
    base = poison(base_model, rows, tmp_path / "poisoned")
    bad, message = bad_step(base, rows, tmp_path / "at-once")
    late, output, events = request.getfixturevalue("late"), tmp_path / "late", list[Event]()
    training = {"save_steps": save_steps, "device": device, "optimizer": optimizer}
    loaded = recipe(base, rows, output, **training)
    with pytest.raises(NumericalError) as caught:
        run(loaded, Options(), events.append)
    assert caught.value.exit_code == ExitCode.NUMERICAL == 5
    assert f"at step {bad}: not finite; the gradient was not used" in caught.value.message
    if device == "cpu":
        assert caught.value.message.replace(str(output), str(tmp_path / "at-once")) == message
    steps = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in steps] == [*range(1, bad + 1)]
    assert [math.isfinite(event.loss) for event in steps] == [True] * (bad - 1) + [False]
    # Before a checkpoint nothing is left unread.
    at_once = bad % save_steps == 0
    assert late().trainer.state.global_step == (bad if at_once else bad + 1)
    if optimizer in (GUARDED, "sgd"):
        assert same(late().before[bad], late().now())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in late().now())
    saved = checkpoints.steps(output / "checkpoints")
    assert max(saved, default=0) == (bad - 1) // save_steps * save_steps
    assert not (output / "adapter").exists()


@pytest.mark.parametrize("optimizer", [GUARDED, EMPTIED, "paged_adamw_8bit"])
@pytest.mark.parametrize(("save_steps", "share"), [(1, None), (2, None), (3, None), (5, 0.1)])
def test_nothing_of_a_bad_step_is_kept(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    optimizer: str,
    save_steps: int,
    share: float | None,
) -> None:
    """A run that goes on from what a stopped one left is the run that left out the bad step."""
    base = poison(base_model, rows, tmp_path / "poisoned")
    whole, output = tmp_path / "whole", tmp_path / "late"
    training = {"optimizer": optimizer, "save_steps": save_steps}
    run(recipe(base, rows, whole, share, on_nonfinite="skip", **training), Options(), print)
    late = request.getfixturevalue("late")
    with pytest.raises(NumericalError):
        run(recipe(base, rows, output, share, **training), Options(), print)
    bad = lines(output)[-1]["step"]
    assert max(checkpoints.steps(output / "checkpoints"), default=0) < bad
    if share is None:  # else the best checkpoint was loaded at the end
        assert same(late().before[bad], late().now()) is (optimizer == GUARDED)
    loaded = recipe(base, rows, output, share, on_nonfinite="skip", **training)
    run(loaded, Options(resume=True), print)
    assert lines(whole) == lines(output)
    weights = adapter(output / "adapter")
    assert all(torch.equal(t, weights[name]) for name, t in adapter(whole / "adapter").items())


@pytest.mark.parametrize("optimizer", [GUARDED, EMPTIED])
def test_a_signal_before_a_bad_step_was_looked_at(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    optimizer: str,
) -> None:
    """What it asks to save is not saved, and the run has failed."""
    base = poison(base_model, rows, tmp_path / "poisoned")
    bad, _ = bad_step(base, rows, tmp_path / "at-once")
    late, output = request.getfixturevalue("late"), tmp_path / "late"
    sent: list[int] = []

    def ask(module: nn.Module, inputs: object) -> None:
        if not sent and isinstance(module, LlamaModel) and late().trainer.state.global_step == bad:
            sent.append(bad)
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_module_forward_pre_hook(ask)
    loaded = recipe(base, rows, output, save_steps=50, optimizer=optimizer)
    try:
        with pytest.raises(NumericalError, match=f"at step {bad}: not finite"):
            run(loaded, Options(), lambda event: None)
    finally:
        hook.remove()
    assert sent == [bad]
    assert checkpoints.steps(output / "checkpoints") == []
    assert json.loads((output / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("optimizer", [GUARDED, EMPTIED])
def test_memory_that_runs_out_before_a_bad_step_was_looked_at(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    optimizer: str,
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
    loaded = recipe(base, rows, output, save_steps=50, on_oom="shrink", optimizer=optimizer)
    try:
        with pytest.raises(NumericalError, match=f"at step {bad}: not finite"):
            run(loaded, Options(), lambda event: None)
    finally:
        hook.remove()
    assert bad not in checkpoints.steps(output / "checkpoints")
