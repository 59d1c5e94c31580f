"""Records of a run that somebody changed: refused by name, never a traceback, never for ever."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.lab import Lab
from faults.scene import Scene, again, check_same_result
from faults.test_refused import copy, sign
from faults.test_resume_equals import stopped_after, train

Change = Callable[[Path, Path], object]
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def stopped(lab: Lab, scene: Scene) -> Path:
    """A run that was stopped after its first of two steps; copy it before you break it."""
    whole, output = scene.output(), scene.output()
    train(lab, scene, whole, {})
    stopped_after(whole, output, 1)
    return output


def change(file: Path, values: dict[str, Any]) -> None:
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps(content))


def state(**values: Any) -> Change:
    """Values of trainer_state.json, in a checkpoint whose hashes agree."""

    def planted(output: Path, checkpoint: Path) -> None:
        change(checkpoint / "trainer_state.json", values)
        sign(checkpoint)

    return planted


def state_text(text: str) -> Change:
    def planted(output: Path, checkpoint: Path) -> None:
        (checkpoint / "trainer_state.json").write_text(text)
        sign(checkpoint)

    return planted


def manifest(text: str) -> Change:
    return lambda output, checkpoint: (checkpoint / "MANIFEST.json").write_text(text)


def pipe(name: str) -> Change:
    def planted(output: Path, checkpoint: Path) -> None:
        file = output / name
        file.unlink(missing_ok=True)
        os.mkfifo(file)

    return planted


CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "manifest nested without end": (manifest(DEEP), "its manifest is missing or damaged"),
    "manifest of a list": (manifest('{"files": []}'), "its manifest is missing or damaged"),
    "manifest of nothing": (manifest('{"files": null}'), "its manifest is missing or damaged"),
    "manifest that is a pipe": (
        pipe("checkpoints/checkpoint-1/MANIFEST.json"),
        "its manifest is missing or damaged",
    ),
    "state nested without end": (state_text(DEEP), "trainer_state.json is missing or damaged"),
    "state of a list": (state_text("[]"), "trainer_state.json is missing or damaged"),
    "state of nothing": (state_text("{}"), "not as it was written: global_step"),
    "empty state": (state_text(""), "trainer_state.json is missing or damaged"),
    "step in words": (state(global_step="x"), "global_step"),
    "step far away": (state(global_step=10**12), "global_step"),
    "step below zero": (state(global_step=-5), "global_step"),
    "best step elsewhere": (state(best_global_step="../../x"), "best_global_step"),
    "best step of a list": (state(best_global_step=[1]), "best_global_step"),
    "best step to come": (state(best_global_step=9), "best_global_step"),
    "best loss in words": (state(best_metric="x"), "best_metric"),
    "no batch": (state(train_batch_size=None), "train_batch_size"),
    "no log": (state(log_history=7), "log_history"),
    "callbacks of numbers": (state(stateful_callbacks={"Patience": 7}), "stateful_callbacks"),
    "an unknown field": (state(evil=7), "evil"),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_checkpoint_with_planted_records(
    lab: Lab, scene: Scene, stopped: Path, what: str
) -> None:
    plant, words = CHECKPOINTS[what]
    output = copy(stopped, scene)
    plant(output, output / "checkpoints" / "checkpoint-1")
    recipe = scene.recipe(output)
    refused = lab.run("train", recipe, "--json", "--resume", cwd=scene.folder, seconds=60)
    assert refused.code == 4, refused.errors
    assert "Traceback" not in refused.errors
    assert "checkpoint-1 is skipped" in refused.output
    assert words in refused.output
    shutil.rmtree(output)


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({"recipe": "x"}, "recipe is not what a run writes"),
    "no recipe": ({"recipe": None}, "recipe is not what a run writes"),
    "base": ({"base": None}, "base is not what a run writes"),
    "files": ({"data": {"files": ["a"]}}, "data.files is not what a run writes"),
    "data": ({"data": None}, "data is not what a run writes"),
    "versions": ({"versions": []}, "versions is not what a run writes"),
    "tokenizer": ({"tokenizer": 3}, "tokenizer is not what a run writes"),
    "plan": ({"plan": []}, "plan is not what a run writes"),
    "status": ({"status": [1]}, "status is not what a run writes"),
    "resumed": ({"resumed": 7}, "resumed is not what a run writes"),
    "shrunk to nothing": ({"shrunk": [1], "plan": {}}, "plan.micro_batch_size is not what"),
    "shrunk to no divisor": (
        {"shrunk": [1], "plan": {"micro_batch_size": 7}},
        "7 rows at a time do not divide the batch",
    ),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_with_planted_values(lab: Lab, scene: Scene, stopped: Path, what: str) -> None:
    values, words = MANIFESTS[what]
    output = copy(stopped, scene)
    change(output / "run.json", values)
    refused = again(lab, scene, output)
    assert refused.code == 4, refused.errors
    assert "Traceback" not in refused.errors
    assert f"run.json: damaged: {words}" in refused.errors
    assert "\nhint: restore it" in refused.errors
    shutil.rmtree(output)


METRICS = (DEEP, '{"step": 1}', '{"step": 1, "loss": "x"}', '{"step": "1", "loss": 1}', "7", "[]")


def test_foreign_lines_of_the_metrics_are_left_out(lab: Lab, scene: Scene, stopped: Path) -> None:
    output = copy(stopped, scene)
    with (output / "metrics.jsonl").open("a") as stream:
        stream.writelines(f"{line}\n" for line in METRICS)
    resumed = again(lab, scene, output)
    assert resumed.code == 0, resumed.errors
    check_same_result(scene, output)


@pytest.mark.parametrize("name", [".lock", "run.json", "metrics.jsonl", "recipe.yaml"])
def test_a_pipe_in_place_of_a_file(lab: Lab, scene: Scene, stopped: Path, name: str) -> None:
    output = copy(stopped, scene)
    pipe(name)(output, output)
    recipe = scene.recipe(output)
    refused = lab.run("train", recipe, "--json", "--resume", cwd=scene.folder, seconds=60)
    assert refused.code == 2, refused.errors
    assert f"{output / name} is no file of a run" in refused.errors
    shutil.rmtree(output)


@pytest.mark.parametrize("name", ["checkpoints", "adapter"])
def test_a_file_in_place_of_a_folder(lab: Lab, scene: Scene, stopped: Path, name: str) -> None:
    output = copy(stopped, scene)
    shutil.rmtree(output / name, ignore_errors=True)
    (output / name).write_text("mine")
    refused = again(lab, scene, output)
    assert refused.code == 2, refused.errors
    assert f"{output / name} is no folder of a run" in refused.errors
    assert (output / name).read_text() == "mine"
    shutil.rmtree(output)
