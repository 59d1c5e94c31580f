"""Where a training step waits for the GPU: nowhere, once it runs."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from poison import poison
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from peftcli.errors import ExitCode, NumericalError
from peftcli.events import Event, Step
from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.train import attempt, checkpoints, trainer
from peftcli.train.build import build_trainer
from peftcli.train.memory import state_bytes
from peftcli.train.run import Options, run
from peftcli.train.trainer import RecipeTrainer

pytestmark = pytest.mark.gpu

SYNCHRONIZE = torch.cuda.synchronize
LORA, QLORA = {"name": "lora", "rank": 4}, {"name": "qlora", "rank": 32}
FIRST, LAST = 4, 9  # kernels are compiled and optimizer states made before the first of these


@pytest.fixture
def base_model(base_model: Path, tmp_path: Path) -> Path:
    """Deeper, so that the states of 100,000 trained values are paged."""
    folder = tmp_path / "deep"
    shutil.copytree(base_model, folder)
    config = LlamaConfig.from_pretrained(base_model, num_hidden_layers=4)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def reported(device: Any = None) -> None:
    """A wait for all of the GPU, told as PyTorch tells of other waits."""
    warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
    SYNCHRONIZE(device)


class Waits(TrainerCallback):  # type: ignore[misc]
    """Every synchronizing call between the begins of two steps, as `file:line`.

    PyTorch reports copies that block and reads of values, and waits for one event are none of them.
    Of waits for the whole GPU it says nothing, so these are reported here, at who calls them.
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
            torch.cuda.synchronize = reported
        elif state.global_step == LAST:
            self.stop()

    def stop(self) -> None:
        torch.cuda.synchronize = SYNCHRONIZE
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
    monkeypatch: pytest.MonkeyPatch,
    base: Path,
    rows: Path,
    output: Path,
    method: dict[str, object],
    **training: object,
) -> list[str]:
    watch, events, built = Waits(), list[Event](), list[RecipeTrainer]()

    def build(*arguments: Any) -> RecipeTrainer:
        built.append(build_trainer(*arguments))
        built[-1].add_callback(watch)
        return built[-1]

    monkeypatch.setattr(attempt, "build_trainer", build)
    steps = {"max_steps": 12, "batch_size": 4, "save_steps": 12, "device": "cuda"}
    values = {
        "model": str(base),
        "method": method,
        "data": {"train": str(rows), "eval": None, "max_length": 64},
        "training": {**steps, **training},
        "output": str(output),
    }
    try:
        run(validate(Document("test.yaml", values)), Options(), events.append)
    finally:
        watch.stop()
    assert [event.step for event in events if isinstance(event, Step)] == [*range(1, 13)]
    assert (state_bytes(built[-1].optimizer)[1] > 0) is (method == QLORA)
    return watch.found


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *((LORA, None), (LORA, "sgd"), (LORA, "adamw_torch"), (LORA, "adafactor")),
        *((QLORA, None), (QLORA, "paged_adamw_8bit")),
    ],
    ids=["lora", "sgd", "adamw", "adafactor", "qlora", "qlora in 8 bits"],
)
@pytest.mark.parametrize("checkpointing", ["none", "full", "offload"])
@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_a_step_waits_nowhere(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: str,
    micro_batch_size: int,
    method: dict[str, object],
    optimizer: str | None,
) -> None:
    training = {"micro_batch_size": micro_batch_size, "checkpointing": checkpointing}
    training |= {"optimizer": optimizer}
    assert waits(monkeypatch, base_model, rows, tmp_path / "run", method, **training) == []


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_what_must_be_judged_first_waits_for_its_two_figures(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, object],
) -> None:
    """And shows that a wait is seen."""
    found = waits(monkeypatch, base_model, rows, tmp_path / "run", method, on_nonfinite="skip")
    assert len(found) == 2 * (LAST - FIRST)
    assert all("trainer.py" in place for place in found)


def test_bitsandbytes_own_step_waits_twice(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the one flat parameter, and at the end; and shows that such a wait is seen."""
    monkeypatch.setattr(trainer, "without_waits", lambda optimizer: None)
    found = waits(monkeypatch, base_model, rows, tmp_path / "run", QLORA)
    assert len(found) == 2 * (LAST - FIRST)
    assert all("bitsandbytes" in place for place in found)


def test_a_bad_row_stops_qlora(base_model: Path, rows: Path, tmp_path: Path) -> None:
    """At the step that a run on a CPU stops at, with nothing kept of it or after it."""
    base = poison(base_model, rows, tmp_path / "poisoned")
    for device in ("cpu", "cuda"):
        values = {
            "model": str(base),
            "method": QLORA,
            "data": {"train": str(rows), "eval": None, "max_length": 64},
            "training": {"max_steps": 12, "batch_size": 4, "save_steps": 2, "device": device},
            "output": str(tmp_path / device),
        }
        events: list[Event] = []
        with pytest.raises(NumericalError) as caught:
            run(validate(Document("test.yaml", values)), Options(), events.append)
        last = max(event.step for event in events if isinstance(event, Step))
        if device == "cpu":
            bad = last
    assert last == bad
    assert caught.value.exit_code == ExitCode.NUMERICAL == 5
    assert f"at step {bad}: not finite; the gradient was not used" in caught.value.message
    folder = tmp_path / "cuda" / "checkpoints"
    assert max(checkpoints.steps(folder)) == (bad - 1) // 2 * 2
    for step in checkpoints.steps(folder):
        saved = load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())
    assert not (tmp_path / "cuda" / "adapter").exists()
