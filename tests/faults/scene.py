"""A short run of the bundled model, its result when nothing happens, and what must hold after."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from faults.lab import Lab, Outcome

_NUMBERS = count()


@dataclass(frozen=True)
class Scene:
    """Rows and a recipe; `adapter` is the digest of an uninterrupted run's result."""

    folder: Path
    values: dict[str, Any]
    adapter: str
    metrics: list[tuple[int, str]]
    operations: int
    seconds: float
    size: int
    """Bytes of the run folder, in whole pages."""

    def output(self) -> Path:
        """A new run folder's path."""
        return self.folder / f"run-{next(_NUMBERS)}"

    def recipe(self, output: Path, **changes: Any) -> str:
        """The recipe file of a run into `output`; `training={...}` and the like change keys."""
        values: dict[str, Any] = {**self.values, "output": str(output)}
        for name, change in changes.items():
            both = isinstance(values.get(name), dict) and isinstance(change, dict)
            both = both and "name" not in change  # another method has other keys
            values[name] = {**values[name], **change} if both else change
        if values["data"]["eval"] is None:
            del values["evaluation"]
        file = self.folder / f"{output.name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return str(file)


def make_scene(lab: Lab, folder: Path, steps: int = 2, every: int = 1) -> Scene:
    """Write rows, train once without a fault, and remember the result."""
    bundled = files("peftcli.bundled") / "data"
    for name, rows in (("train", 24), ("eval", 4)):
        lines = (bundled / f"quickstart.{name}.jsonl").read_text().splitlines()[:rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "model": "bundled:tiny",
        "method": {"name": "lora", "rank": 4, "dropout": 0.1},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": 128,
        },
        "training": {"max_steps": steps, "batch_size": 2, "save_steps": every},
        "evaluation": {"steps": every},
    }
    empty = Scene(folder, values, "", [], 0, 0.0, 0)
    output = empty.output()
    outcome = lab.run("train", empty.recipe(output), "--json", cwd=folder, below=output)
    assert outcome.code == 0, outcome.errors
    sizes = [path.lstat().st_size for path in output.rglob("*")]
    return Scene(
        folder,
        values,
        adapter(output),
        steps_of(output),
        outcome.operations,
        outcome.seconds,
        sum(-(-size // 4096) * 4096 for size in sizes),
    )


def again(lab: Lab, scene: Scene, output: Path, *more: str, **changes: Any) -> Outcome:
    """What a person does after a fault: `--resume`, or the same command where no run began."""
    resume = ["--resume"] if (output / "run.json").exists() else []
    recipe = scene.recipe(output, **changes)
    return lab.run("train", recipe, "--json", *resume, *more, cwd=scene.folder)


def check_same_result(scene: Scene, output: Path) -> None:
    """The adapter has the same bytes, each step is there once, and nothing half-written is left."""
    assert adapter(output) == scene.adapter
    assert steps_of(output) == scene.metrics
    assert finished(output)
    assert [path for path in output.rglob("*") if path.name.startswith(".staging")] == []


def finished(output: Path) -> bool:
    """Whether the manifest says that nothing is left to do."""
    manifest = output / "run.json"
    return manifest.exists() and json.loads(manifest.read_text())["status"] == "finished"


def adapter(output: Path) -> str:
    """sha256 of the adapter's weights."""
    return hashlib.sha256(
        (output / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def steps_of(output: Path) -> list[tuple[int, str]]:
    """Step and kind of each line of metrics.jsonl; a torn line is an error."""
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    found = [json.loads(line) for line in lines]
    return [(line["step"], "eval" if "eval_loss" in line else "train") for line in found]


def check_no_half_result(output: Path) -> None:
    """What a loader would take for a result is whole, or not there."""
    from peftcli.train import checkpoints

    folder = output / "checkpoints"
    for step in checkpoints.steps(folder):
        assert checkpoints.verify(folder / f"checkpoint-{step}") is None
    result = output / "adapter"
    if result.exists():
        names = {path.name for path in result.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names


def forget(output: Path) -> None:
    """Make room for the next run."""
    shutil.rmtree(output, ignore_errors=True)
    output.with_name(f"{output.name}.yaml").unlink(missing_ok=True)
