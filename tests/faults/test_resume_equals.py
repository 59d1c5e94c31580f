"""On a CPU a resumed run is, byte for byte, the run that was never stopped: for every method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from faults.lab import Lab
from faults.scene import Scene, again, steps_of

from peftcli.train import checkpoints

STEPS, STOP = 6, 3
RISING: dict[str, Any] = {  # a rate at which the held-out loss is best at the start
    "training": {
        "max_steps": 4,
        "save_steps": 1,
        "keep_checkpoints": 9,
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup": 0,
    },
    "evaluation": {"steps": 1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora with dropout": {"method": {"name": "lora", "rank": 4, "dropout": 0.2}},
    "dora": {"method": {"name": "lora", "rank": 4, "use_dora": True}},
    "lora+ and another schedule": {
        "method": {"name": "lora", "rank": 4, "loraplus_lr_ratio": 16},
        "training": {"schedule": "linear", "warmup": 0.5, "weight_decay": 0.1},
    },
    "qlora, paged": {"method": {"name": "qlora", "rank": 4, "dropout": 0.1}},
    "qlora, paged in 8 bits": {
        "method": {"name": "qlora", "rank": 4},
        "training": {"optimizer": "paged_adamw_8bit"},
    },
    "adapter": {"method": {"name": "adapter", "bottleneck_size": 8}},
    "adapter on 4 bits": {
        "method": {"name": "adapter", "bottleneck_size": 8, "quantization": "nf4"},
    },
    "full": {"method": {"name": "full"}, "training": {"learning_rate": 1e-4}},
    "packing": {"training": {"packing": True}},
    "accumulation and a second epoch": {
        "training": {"batch_size": 8, "micro_batch_size": 2, "epochs": 2},
    },
    "neftune": {"training": {"neftune_noise_alpha": 5.0}},
    "adafactor": {"training": {"optimizer": "adafactor"}},
    "last instead of best": {"evaluation": {"keep_best": False}},
}


def train(lab: Lab, scene: Scene, output: Path, changes: dict[str, Any]) -> None:
    done = lab.run("train", scene.recipe(output, **changes), "--json", cwd=scene.folder)
    assert done.code == 0, done.errors


def stopped_after(source: Path, target: Path, step: int) -> None:
    """A copy of a finished run as a kill after `step` would have left it."""
    shutil.copytree(source, target)
    for result in ("adapter", "model"):
        shutil.rmtree(target / result, ignore_errors=True)
    for later in checkpoints.steps(target / "checkpoints"):
        if later > step:
            shutil.rmtree(target / "checkpoints" / f"checkpoint-{later}")
    manifest = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(manifest | {"status": "running"}))


def weights(output: Path) -> bytes:
    (file,) = [*output.glob("adapter/*.safetensors"), *output.glob("model/*.safetensors")]
    return file.read_bytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_equals_uninterrupted(lab: Lab, scene: Scene, name: str) -> None:
    steps = {"max_steps": STEPS, "save_steps": STOP, "keep_checkpoints": 9}
    training = steps | VARIANTS[name].get("training", {})
    evaluation = {"steps": STOP} | VARIANTS[name].get("evaluation", {})
    changes = VARIANTS[name] | {"training": training, "evaluation": evaluation}
    whole, output = scene.output(), scene.output()
    train(lab, scene, whole, changes)
    stopped_after(whole, output, STOP)
    resumed = again(lab, scene, output, **changes)
    assert resumed.code == 0, resumed.errors
    assert f"resuming from checkpoint-{STOP}" in resumed.output
    assert weights(output) == weights(whole)
    assert steps_of(output) == steps_of(whole)
    shutil.rmtree(whole)
    shutil.rmtree(output)


@pytest.mark.parametrize("stop", [2, 3])
def test_early_stopping_counts_on(lab: Lab, scene: Scene, stop: int) -> None:
    """The evaluations before the stop count, even when the one that ended the run was the last."""
    changes = {
        "training": {"max_steps": 12, "save_steps": 1, "keep_checkpoints": 20},
        "evaluation": {"steps": 1, "early_stopping": 3, "early_stopping_threshold": 5.0},
    }
    whole, output = scene.output(), scene.output()
    train(lab, scene, whole, changes)
    last = max(step for step, _ in steps_of(whole))
    assert last == 4  # the first evaluation is the best, three more are not
    stopped_after(whole, output, stop if stop == 2 else last)
    resumed = again(lab, scene, output, **changes)
    assert resumed.code == 0, resumed.errors
    assert steps_of(output) == steps_of(whole)
    assert weights(output) == weights(whole)


def test_twice_the_same_recipe_is_twice_the_same_adapter(lab: Lab, scene: Scene) -> None:
    """And the manifest says on what that was promised."""
    output = scene.output()
    train(lab, scene, output, {})
    manifest = json.loads((output / "run.json").read_text())
    assert manifest["deterministic"] is True
    assert manifest["threads"] == 1
    assert manifest["device"]["kind"] == "cpu"
    assert manifest["seed"] == 42
    other = scene.output()
    train(lab, scene, other, {})
    assert weights(output) == weights(other)
