"""Predicted beside measured, and the measuring itself as far as a CPU has anything to measure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from peftcli.architecture.config import read_architecture
from peftcli.estimate.compare import compare, predicted, show_comparison
from peftcli.estimate.gpus import find_gpu
from peftcli.estimate.run import run
from peftcli.models import Device, load_tokenizer
from peftcli.recipe.schema import Recipe
from peftcli.train.measure import measure
from peftcli.train.random_rows import Shape


def recipe(model: str, method: object = "lora") -> Recipe:
    training = {"micro_batch_size": 2, "batch_size": 4, "checkpointing": "full", "max_steps": 100}
    values = {"model": model, "method": method, "data": {"train": "rows.jsonl"}, "output": "o"}
    return Recipe.model_validate({**values, "training": training})


def test_each_quantity_that_was_measured_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = run(recipe("llama-3.1-8b"), find_gpu("h200"))
    said = predicted(estimate)
    measured = {**said, "peak_gib": said["peak_gib"] / 1.02, "card_gib": None}
    lines = compare(estimate, measured)
    assert {line.part for line in lines} == set(said) - {"card_gib"}
    errors = {line.part: line.error for line in lines}
    assert errors["peak_gib"] == pytest.approx(0.02)
    assert errors["base_gib"] == 0
    assert errors["paged_gib"] is None  # nothing is paged
    show_comparison(estimate, lines)
    shown = capsys.readouterr().out
    assert "peak allocated in a step" in shown
    assert "+2.0%" in shown
    assert "the measured peak lies inside" in shown
    far = compare(estimate, {"peak_gib": 2 * said["peak_gib"]})
    show_comparison(estimate, far)
    assert "OUTSIDE" in capsys.readouterr().out


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, {"name": "qlora", "rank": 4}])
def test_a_real_model_is_trained_for_two_steps(
    base_model: Path, method: object, packing: bool
) -> None:
    device = Device("cpu", "float32", "CPU", None)
    values = recipe(str(base_model), method)
    architecture = read_architecture(base_model)
    shape = Shape(32, 2, mode="full", packing=packing)
    found = measure(values, architecture, device, load_tokenizer(values.model), shape)
    assert found.steps == 2  # whatever the recipe says
    assert found.step_seconds > 0
    assert 4 < found.loss < 7  # ln 288 = 5.66
    memory = {key: value for key, value in asdict(found).items() if key.endswith("_gib")}
    assert set(memory.values()) == {None}
