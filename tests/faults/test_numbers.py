"""Numbers that went wrong: found at once, never taken over, and said in one sentence."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from poison import poison
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftcli.errors import ExitCode, NumericalError
from peftcli.events import Event, Step, Warned
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.train import checkpoints
from peftcli.train.health import EXPLOSIONS, STUCK, STUCK_WARNING, ZERO_WARNING, Health
from peftcli.train.run import Options, TrainResult, run


def recipe(base: Path, rows: Path, output: Path, **training: object) -> LoadedRecipe:
    values = {
        "model": str(base),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(rows), "eval": None, "max_length": 64},
        "training": {"max_steps": 12, "batch_size": 4, "save_steps": 1, **training},
        "output": str(output),
    }
    return validate(Document("test.yaml", values))


@pytest.fixture
def poisoned(base_model: Path, rows: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base to which one letter means nothing finite, and rows of which one has that letter."""
    return poison(base_model, rows, tmp_path / "poisoned"), rows


def finite(folder: Path) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in load_file(folder).values())


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_a_poisoned_row(poisoned: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    base, rows = poisoned
    events: list[Event] = []
    loaded = recipe(base, rows, tmp_path / "run", on_nonfinite=what)
    losses = lambda: [event.loss for event in events if isinstance(event, Step)]  # noqa: E731
    folder = tmp_path / "run" / "checkpoints"
    if what == "stop":
        with pytest.raises(NumericalError, match="the gradient was not used") as caught:
            run(loaded, Options(), events.append)
        assert caught.value.exit_code == ExitCode.NUMERICAL == 5
        assert [math.isfinite(loss) for loss in losses()].count(False) == 1
        assert not math.isfinite(losses()[-1])
        assert max(checkpoints.steps(folder)) == len(losses()) - 1
        assert not (tmp_path / "run" / "adapter").exists()
    else:
        result = run(loaded, Options(), events.append)
        assert result.steps == 12
        assert [math.isfinite(loss) for loss in losses()].count(False) == 1
        warned = [event.text for event in events if isinstance(event, Warned)]
        assert any("the step is skipped" in text for text in warned)
        assert finite(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for step in checkpoints.steps(folder):
        assert checkpoints.verify(folder / f"checkpoint-{step}") is None
        assert finite(folder / f"checkpoint-{step}" / "adapter_model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "paged_adamw_32bit", "adafactor"])
def test_a_skipped_step_changes_no_parameter(
    poisoned: tuple[Path, Path], tmp_path: Path, optimizer: str
) -> None:
    """And those after it do, whichever library the optimizer is from."""
    base, rows = poisoned
    events: list[Event] = []
    training = {"on_nonfinite": "skip", "keep_checkpoints": 20, "optimizer": optimizer}
    run(recipe(base, rows, tmp_path / "run", **training), Options(), events.append)
    bad = next(e.step for e in events if isinstance(e, Step) and not math.isfinite(e.loss))
    folder = tmp_path / "run" / "checkpoints"
    weights = [
        (folder / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()
        for step in (bad - 1, bad, bad + 1)
    ]
    assert weights[0] == weights[1] != weights[2]


def test_a_run_that_resumes_after_a_skipped_step(
    poisoned: tuple[Path, Path], tmp_path: Path
) -> None:
    base, rows = poisoned
    training = {"on_nonfinite": "skip", "keep_checkpoints": 20}
    loaded = recipe(base, rows, tmp_path / "run", **training)
    run(loaded, Options(), lambda event: None)
    output = tmp_path / "run"
    whole = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(output / "checkpoints" / "checkpoint-12")
    manifest = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    run(loaded, Options(resume=True), lambda event: None)
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def stuck_base(base_model: Path, folder: Path) -> Path:
    """A base whose head is zero: the loss is ln(vocabulary) and nothing has a gradient."""
    shutil.copytree(base_model, folder)
    model = AutoModelForCausalLM.from_pretrained(base_model)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(folder)
    return folder


def test_a_loss_that_is_stuck(base_model: Path, rows: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    base = stuck_base(base_model, tmp_path / "stuck")
    loaded = recipe(base, rows, tmp_path / "run", max_steps=60, save_steps=20)

    def go() -> TrainResult:
        return run(loaded, Options(), events.append)

    with pytest.raises(NumericalError, match=r"loss 5\.6630 and gradient norm 0\.0"):
        go()
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == STUCK
    assert steps[-1].loss == pytest.approx(math.log(288), abs=1e-4)
    place = next(
        i for i, e in enumerate(events) if isinstance(e, Warned) and "no gradient" in e.text
    )
    assert sum(isinstance(event, Step) for event in events[:place]) == STUCK_WARNING - 1


def healthy(on_nonfinite: str = "stop") -> Health:
    health = Health(on_nonfinite=on_nonfinite, max_nonfinite=3, max_norm=1.0)  # type: ignore[arg-type]
    for step in range(1, 21):
        assert health.admits(step, 2.0, 0.5)
    return health


def test_a_gradient_that_explodes() -> None:
    """One is scaled down and told, or skipped; three in a row end the run."""
    for what, taken in (("stop", True), ("skip", False)):
        health = healthy(what)
        assert health.admits(21, 2.0, 5000.0) is taken
        assert len(health.told()) == 1
        assert health.failure is None
        for step in range(22, 21 + EXPLOSIONS):
            taken = health.admits(step, 2.0, 5000.0)
        assert not taken
        assert "exploded for 3 steps in a row" in str(health.failure)


def test_norms_that_only_vary_are_no_explosion() -> None:
    health = healthy()
    assert all(health.admits(21 + i, 2.0, norm) for i, norm in enumerate([400.0, 1e-9, 9.0, 300.0]))
    assert health.told() == []


def test_a_loss_of_exactly_zero_is_told_within_three_steps() -> None:
    health = healthy()
    for step in range(21, 21 + ZERO_WARNING):
        assert health.told() == []
        health.admits(step, 0.0, 0.1)
    assert "loss is exactly 0 since step 21" in health.told()[0]
    for step in range(21 + ZERO_WARNING, 21 + STUCK):
        health.admits(step, 0.0, 0.1)
    assert "stuck" in str(health.failure)


def test_an_overflow_in_float16_is_left_to_the_scaler() -> None:
    health = Health(on_nonfinite="stop", max_nonfinite=3, max_norm=1.0, scaled=True)
    assert health.admits(1, 2.0, math.inf)
    assert not health.admits(2, math.nan, math.inf)
    assert health.failure is not None
