"""What a resume refuses: another recipe, other rows, another base, files that were planted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.lab import Lab
from faults.scene import Scene, adapter, again, steps_of
from faults.test_resume_equals import RISING, stopped_after, train

from peftcli.train import checkpoints


@pytest.fixture(scope="module")
def stopped(lab: Lab, scene: Scene) -> Path:
    """A run that was stopped after its first of two steps; copy it before you break it."""
    whole, output = scene.output(), scene.output()
    train(lab, scene, whole, {})
    stopped_after(whole, output, 1)
    return output


def copy(stopped: Path, scene: Scene) -> Path:
    output = scene.output()
    shutil.copytree(stopped, output)
    return output


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"training": {"learning_rate": 5e-3}}, "training.learning_rate was"),
    "batch": ({"training": {"batch_size": 4}}, "training.batch_size was 2, is 4"),
    "micro-batch": ({"training": {"micro_batch_size": 1}}, "training.micro_batch_size was auto"),
    "schedule": ({"training": {"schedule": "linear"}}, "training.schedule was cosine"),
    "steps": ({"training": {"max_steps": 9}}, "training.max_steps was 2, is 9"),
    "optimizer": ({"training": {"optimizer": "sgd"}}, "training.optimizer was"),
    "seed": ({"seed": 7}, "seed was 42, is 7"),
    "dropout": ({"method": {"dropout": 0.3}}, "method.dropout was 0.1, is 0.3"),
    "rank": ({"method": {"rank": 8}}, "method.rank was 4, is 8"),
    "method": ({"method": {"name": "qlora", "rank": 4}}, "method.name was lora, is qlora"),
    "length": ({"data": {"max_length": 120}}, "data.max_length was 128, is 120"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_recipe(lab: Lab, scene: Scene, stopped: Path, what: str) -> None:
    change, message = CHANGES[what]
    output = copy(stopped, scene)
    refused = again(lab, scene, output, **change)
    assert refused.code == 2, refused.errors
    assert message in refused.errors
    assert "--force goes on and records it" in refused.errors
    assert steps_of(output) == steps_of(stopped)


def test_force_goes_on_and_records(lab: Lab, scene: Scene, stopped: Path) -> None:
    """The change takes effect: the result is not that of the old recipe."""
    output = copy(stopped, scene)
    forced = again(lab, scene, output, "--force", training={"weight_decay": 0.5})
    assert forced.code == 0, forced.errors
    recorded = json.loads((output / "run.json").read_text())["resumed_with_changes"]
    assert recorded == ["recipe: training.weight_decay was 0.0, is 0.5"]


def test_changed_rows(lab: Lab, scene: Scene, stopped: Path) -> None:
    rows = scene.folder / "other.jsonl"
    lines = (scene.folder / "train.jsonl").read_text().splitlines()
    rows.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    output = copy(stopped, scene)
    refused = again(lab, scene, output, data={"train": str(rows)})
    assert refused.code == 2
    assert "data: the content of the data files changed" in refused.errors


def test_another_version(lab: Lab, scene: Scene, stopped: Path) -> None:
    output = copy(stopped, scene)
    manifest = json.loads((output / "run.json").read_text())
    manifest["versions"]["torch"] = "2.0.0"
    manifest["versions"]["peftcli"] = "0.0.0"
    (output / "run.json").write_text(json.dumps(manifest))
    refused = again(lab, scene, output)
    assert refused.code == 2
    assert "versions: torch was 2.0.0, is" in refused.errors
    assert "versions: peftcli was 0.0.0, is" in refused.errors


@pytest.fixture
def base(scene: Scene, tmp_path: Path) -> Path:
    """A copy of the bundled base that may be changed."""
    folder = tmp_path / "base"
    shutil.copytree(str(files("peftcli.bundled") / "tiny"), folder)
    return folder


def change_values(base: Path) -> None:
    """The same shapes and another value, in place."""
    with (base / "model.safetensors").open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)
        stream.write(b"\x11" * 64)


def test_a_base_of_the_same_shape(lab: Lab, scene: Scene, base: Path) -> None:
    whole, output = scene.output(), scene.output()
    train(lab, scene, whole, {"model": str(base)})
    stopped_after(whole, output, 1)
    change_values(base)
    refused = again(lab, scene, output, model=str(base))
    assert refused.code == 4, refused.errors
    assert "base: other weights than those it was started with" in refused.errors


BASES: dict[str, Callable[[Path], None]] = {
    "changed": change_values,
    "removed": shutil.rmtree,
    "cut": lambda base: os.truncate(base / "model.safetensors", 1_000_000),
    "replaced": lambda base: (base / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("how", BASES)
def test_a_base_that_changes_while_the_run_goes_on(
    lab: Lab, scene: Scene, base: Path, how: str
) -> None:
    """Checkpoints are of the old base, nothing is published, and restoring it finishes the run."""
    safe = base.with_name("safe")
    shutil.copytree(base, safe)
    whole, output = scene.output(), scene.output()
    longer = {"training": {"max_steps": 6, "save_steps": 1, "keep_checkpoints": 9}}
    train(lab, scene, whole, {"model": str(base), **longer})
    recipe = scene.recipe(output, model=str(base), **longer)
    seen = '"event": "saved", "step": 2,'
    broken = lab.run(
        "train", recipe, "--json", cwd=scene.folder, meanwhile=(seen, lambda: BASES[how](base))
    )
    assert broken.code == 4, broken.errors
    assert "was changed or removed while the run went on" in broken.errors
    assert "Traceback" not in broken.errors
    assert not (output / "adapter").exists()
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(safe, base)
    resumed = again(lab, scene, output, model=str(base), **longer)
    assert resumed.code == 0, resumed.errors
    assert adapter(output) == adapter(whole)
    assert steps_of(output) == steps_of(whole)


class Planted:
    """Runs a command when somebody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


def sign(checkpoint: Path) -> None:
    """Make the manifest agree with the files, as somebody who planted one would."""
    (checkpoint / checkpoints.MANIFEST).unlink()
    entries = {
        str(file.relative_to(checkpoint)): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(checkpoint.rglob("*"))
    }
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps({"files": entries}))


@pytest.mark.parametrize("signed", [False, True], ids=["found by its hash", "with a new manifest"])
@pytest.mark.parametrize("name", FILES)
def test_a_planted_pickle_is_never_run(
    lab: Lab, scene: Scene, stopped: Path, tmp_path: Path, name: str, signed: bool
) -> None:
    output, mark = copy(stopped, scene), tmp_path / "mark"
    checkpoint = output / "checkpoints" / "checkpoint-1"
    torch.save({"state": Planted(mark)}, checkpoint / name)
    if signed:
        sign(checkpoint)
    refused = again(lab, scene, output)
    assert refused.code == 4, refused.errors
    assert not mark.exists()
    assert "weights_only" not in refused.errors
    assert "Traceback" not in refused.errors


def test_a_raw_pickle_is_never_run(lab: Lab, scene: Scene, stopped: Path, tmp_path: Path) -> None:
    output, mark = copy(stopped, scene), tmp_path / "mark"
    checkpoint = output / "checkpoints" / "checkpoint-1"
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Planted(mark)))
    sign(checkpoint)
    refused = again(lab, scene, output)
    assert refused.code == 4, refused.errors
    assert not mark.exists()
    assert "weights_only" not in refused.errors


def test_an_archive_that_inflates(lab: Lab, scene: Scene, stopped: Path) -> None:
    """100 MB of zeros in 100 kB: PyTorch would unpack it."""
    output = copy(stopped, scene)
    checkpoint = output / "checkpoints" / "checkpoint-1"
    plain = io.BytesIO()
    torch.save({"state": torch.zeros(25_000_000)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(checkpoint / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert (checkpoint / "optimizer.pt").stat().st_size < 200_000
    sign(checkpoint)
    refused = again(lab, scene, output)
    assert refused.code == 4
    assert "it is compressed" in refused.output + refused.errors


@pytest.mark.parametrize("name", ["rng_state.pth", "scheduler.pt", "trainer_state.json"])
def test_a_file_that_is_missing(lab: Lab, scene: Scene, stopped: Path, name: str) -> None:
    output = copy(stopped, scene)
    (output / "checkpoints" / "checkpoint-1" / name).unlink()
    refused = again(lab, scene, output)
    assert refused.code == 4
    assert f"checkpoint-1 is skipped: {name} is missing" in refused.output
    assert "every checkpoint is damaged" in refused.errors


def test_a_link_out_of_a_checkpoint(lab: Lab, scene: Scene, stopped: Path) -> None:
    output = copy(stopped, scene)
    checkpoint = output / "checkpoints" / "checkpoint-1"
    moved = scene.folder / "elsewhere.pt"
    shutil.move(checkpoint / "optimizer.pt", moved)
    (checkpoint / "optimizer.pt").symlink_to(moved)
    refused = again(lab, scene, output)
    assert refused.code == 4
    assert "checkpoint-1 is skipped: it holds a link" in refused.output


def test_an_empty_newest_folder(lab: Lab, scene: Scene, stopped: Path) -> None:
    output = copy(stopped, scene)
    (output / "checkpoints" / "checkpoint-2").mkdir()
    resumed = again(lab, scene, output)
    assert resumed.code == 0, resumed.errors
    assert "checkpoint-2 is skipped: its manifest is missing or damaged" in resumed.output
    assert adapter(output) == scene.adapter


def test_a_damaged_best_checkpoint(lab: Lab, scene: Scene) -> None:
    """The result may come from it, so the run goes back to before it."""
    whole, output = scene.output(), scene.output()
    train(lab, scene, whole, RISING)
    best = json.loads((whole / "run.json").read_text())["result"]["best_step"]
    stopped_after(whole, output, 3)
    assert best < 3
    (output / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors").write_bytes(b"")
    resumed = again(lab, scene, output, **RISING)
    assert f"the best one before it, checkpoint-{best}, is damaged" in resumed.output
    assert resumed.code == (0 if best > 1 else 4), resumed.errors


def test_a_run_that_another_process_writes(lab: Lab, scene: Scene, stopped: Path) -> None:
    from peftcli.run_dir import RunDir, locked

    output = copy(stopped, scene)
    with locked(RunDir(output)):
        for more in ([], ["--resume"], ["--overwrite"]):
            recipe = scene.recipe(output)
            refused = lab.run("train", recipe, "--json", *more, cwd=scene.folder)
            assert refused.code == 3, refused.errors
            assert f"is in use by process {os.getpid()} on" in refused.errors
    assert again(lab, scene, output).code == 0


def test_a_second_fresh_run_in_the_same_folder(lab: Lab, scene: Scene, stopped: Path) -> None:
    output = copy(stopped, scene)
    refused = lab.run("train", scene.recipe(output), "--json", cwd=scene.folder)
    assert refused.code == 2
    assert "--resume goes on with it, --overwrite replaces it" in refused.errors
