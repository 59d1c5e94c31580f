"""Where a training step waits for the GPU: nowhere, once it runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from peftcli.events import Event, Step
from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.train import attempt
from peftcli.train.build import build_trainer
from peftcli.train.run import Options, run
from peftcli.train.trainer import RecipeTrainer

pytestmark = pytest.mark.gpu

FIRST, LAST = 4, 9  # kernels are compiled and optimizer states made before the first of these


class Waits(TrainerCallback):  # type: ignore[misc]
    """Every synchronizing call between the begins of two steps, as `file:line`.

    PyTorch reports copies that block and reads of values; waits for one event are none of them.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._recording = warnings.catch_warnings(record=True)
        self._caught: list[warnings.WarningMessage] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == FIRST:
            self._caught = self._recording.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == LAST:
            self.stop()

    def stop(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        if self._caught is not None:
            self._recording.__exit__(None, None, None)
            self.found = [
                f"{caught.filename}:{caught.lineno}"
                for caught in self._caught
                if "synchronizing CUDA operation" in str(caught.message)
            ]
            self._caught = None


def waits(
    monkeypatch: pytest.MonkeyPatch, base: Path, rows: Path, output: Path, **training: object
) -> list[str]:
    watch, events = Waits(), list[Event]()

    def build(*arguments: Any) -> RecipeTrainer:
        trainer = build_trainer(*arguments)
        trainer.add_callback(watch)
        return trainer

    monkeypatch.setattr(attempt, "build_trainer", build)
    steps = {"max_steps": 12, "batch_size": 4, "save_steps": 12, "device": "cuda"}
    values = {
        "model": str(base),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(rows), "eval": None, "max_length": 64},
        "training": {**steps, **training},
        "output": str(output),
    }
    try:
        run(validate(Document("test.yaml", values)), Options(), events.append)
    finally:
        watch.stop()
    assert [event.step for event in events if isinstance(event, Step)] == [*range(1, 13)]
    return watch.found


@pytest.mark.parametrize("checkpointing", ["none", "full", "offload"])
@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_a_step_waits_nowhere(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: str,
    micro_batch_size: int,
) -> None:
    size = {"micro_batch_size": micro_batch_size, "checkpointing": checkpointing}
    assert waits(monkeypatch, base_model, rows, tmp_path / "run", **size) == []


@pytest.mark.parametrize(
    "training", [{"on_nonfinite": "skip"}, {"optimizer": "sgd"}], ids=["skip", "sgd"]
)
def test_what_must_be_judged_first_waits_for_its_two_figures(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, object],
) -> None:
    """And shows that a wait is seen."""
    found = waits(monkeypatch, base_model, rows, tmp_path / "run", **training)
    assert len(found) == 2 * (LAST - FIRST)
    assert all("trainer.py" in place for place in found)
