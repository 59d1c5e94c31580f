"""Disks that are full, small, read-only, elsewhere or late; and clocks that go back."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults.lab import Fault, Lab
from faults.scene import (
    Scene,
    adapter,
    again,
    check_no_half_result,
    check_same_result,
    forget,
    steps_of,
)
from faults.test_resume_equals import RISING, stopped_after, train

from peftcli.run_dir import publish_folder
from peftcli.train import checkpoints


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A mount at `folder`, gone afterwards; skips where nobody may mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", *options, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("no right to mount a disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk(folder: Path, size: str) -> object:
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


@pytest.mark.parametrize("share", [0.01, 0.4, 0.75, 0.85, 0.95])
def test_a_disk_that_is_full(lab: Lab, scene: Scene, share: float) -> None:
    """Before the first step, in a checkpoint, or at the result; with more room the run ends."""
    output = scene.output()
    with disk(output, str(int(scene.size * share))):  # type: ignore[attr-defined]
        full = lab.run("train", scene.recipe(output), "--json", cwd=scene.folder)
        assert full.code == 3, full.errors
        assert full.errors.count("error: ") == 1
        assert "free disk space" in full.errors
        assert "Traceback" not in full.errors
        if share < 0.5:
            assert '"event": "step"' not in full.output
        check_no_half_result(output)
        larger = ["mount", "-o", "remount,size=100m", str(output)]
        subprocess.run(larger, check=True)
        resumed = again(lab, scene, output)
        assert resumed.code == 0, resumed.errors
        check_same_result(scene, output)


def test_a_read_only_disk_is_met_before_the_model_loads(lab: Lab, scene: Scene) -> None:
    output = scene.output()
    with mounted(output, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        refused = lab.run("train", scene.recipe(output), "--json", cwd=scene.folder)
    assert refused.code == 3
    assert "cannot be written: Read-only file system" in refused.errors
    assert refused.output == ""


def test_an_output_that_is_a_file(lab: Lab, scene: Scene) -> None:
    output = scene.output()
    output.write_text("mine")
    refused = lab.run("train", scene.recipe(output), "--json", cwd=scene.folder)
    assert refused.code == 2
    assert "is a file" in refused.errors
    assert output.read_text() == "mine"


@pytest.mark.parametrize("number", [1, 150, 300])
def test_a_folder_that_may_not_be_written(exact: Lab, scene: Scene, number: int) -> None:
    """At the start, or because somebody took the right away while the run went on."""
    output = scene.output()
    fault = Fault("fail on", number, errno.EACCES)
    recipe = scene.recipe(output)
    refused = exact.run("train", recipe, "--json", cwd=scene.folder, fault=fault, below=output)
    assert refused.code == 3, refused.errors
    assert "permission denied" in refused.errors.lower()
    assert "Traceback" not in refused.errors
    check_no_half_result(output)
    assert again(exact, scene, output).code == 0
    check_same_result(scene, output)


@pytest.mark.parametrize(("error", "code"), [(errno.EIO, 3), (errno.EACCES, 2)])
def test_an_input_that_cannot_be_read(exact: Lab, scene: Scene, error: int, code: int) -> None:
    """A failing disk is no mistake of the recipe's; a file without rights is the user's to mend."""
    output = scene.output()
    recipe = Path(scene.recipe(output))
    for file in (recipe, scene.folder / "train.jsonl"):
        fault = Fault("fail", 1, error)
        refused = exact.run(
            "train", str(recipe), "--json", cwd=scene.folder, fault=fault, below=file
        )
        assert refused.code == code, refused.errors
        assert f"{file.name}: cannot be read: {os.strerror(error)}\nhint: check " in refused.errors
        assert "Traceback" not in refused.errors
        check_no_half_result(output)


def test_an_output_on_another_disk(lab: Lab, scene: Scene) -> None:
    """Everything is written aside within the run folder, so no rename crosses a border."""
    output, elsewhere = scene.output(), scene.folder / "elsewhere"
    with disk(elsewhere, "50m"):  # type: ignore[attr-defined]
        output.symlink_to(elsewhere)
        done = lab.run("train", scene.recipe(output), "--json", cwd=scene.folder)
        assert done.code == 0, done.errors
        check_same_result(scene, output)
        assert len(checkpoints.steps(elsewhere / "checkpoints")) == 2


@pytest.mark.parametrize("number", [2, 200, 420])
def test_a_clock_that_goes_back_a_day(exact: Lab, scene: Scene, number: int) -> None:
    output = scene.output()
    fault, recipe = Fault("clock back", number), scene.recipe(output)
    done = exact.run("train", recipe, "--json", cwd=scene.folder, fault=fault, below=output)
    assert done.code == 0, done.errors
    check_same_result(scene, output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0


def test_the_newest_checkpoint_is_the_last_step_and_not_the_last_date(
    lab: Lab, scene: Scene
) -> None:
    whole, output = scene.output(), scene.output()
    train(lab, scene, whole, {})
    stopped_after(whole, output, 2)
    os.utime(output / "checkpoints" / "checkpoint-2", (0, 0))
    resumed = again(lab, scene, output)
    assert "resuming from checkpoint-2" in resumed.output
    check_same_result(scene, output)


def test_seconds_go_on_after_a_resume(exact: Lab, scene: Scene) -> None:
    output = scene.output()
    fault, recipe = Fault("kill", scene.operations // 2), scene.recipe(output)
    killed = exact.run("train", recipe, "--json", cwd=scene.folder, fault=fault, below=output)
    assert killed.signal == signal.SIGKILL
    assert again(exact, scene, output).code == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    assert seconds == sorted(seconds)


def test_files_have_the_mode_that_the_umask_gives(lab: Lab, scene: Scene) -> None:
    output = scene.output()
    done = lab.run("train", scene.recipe(output), "--json", cwd=scene.folder, umask=0o022)
    assert done.code == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o644} == {}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_what_a_library_wrote_for_its_owner_only(tmp_path: Path, umask: int, mode: int) -> None:
    staging = tmp_path / ".staging-adapter"
    staging.mkdir()
    (staging / "adapter_model.safetensors").write_bytes(b"x")
    (staging / "adapter_model.safetensors").chmod(0o600)
    before = os.umask(umask)
    try:
        publish_folder(staging, tmp_path / "adapter")
    finally:
        os.umask(before)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert file.stat().st_mode & 0o777 == mode


def test_a_run_folder_that_was_moved_keeps_its_best_checkpoint(lab: Lab, scene: Scene) -> None:
    """Recorded paths are those of the old place."""
    whole, moved = scene.output(), scene.output()
    train(lab, scene, whole, RISING)
    result = json.loads((whole / "run.json").read_text())["result"]
    assert result["best_step"] < 3
    stopped_after(whole, moved, 3)
    expected, steps = adapter(whole), steps_of(whole)
    forget(whole)
    resumed = again(lab, scene, moved, **RISING)
    assert resumed.code == 0, resumed.errors
    assert adapter(moved) == expected
    assert steps_of(moved) == steps
    forget(moved)
