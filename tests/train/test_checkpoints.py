"""Checkpoints that are complete or not there, and runs that go on where they stopped."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from forked import Running, server

from peftcli.errors import ArtefactError, UsageError
from peftcli.events import Event, Warned
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.train import checkpoints
from peftcli.train.run import Options, TrainResult, run


def recipe(base: Path, rows: Path, output: Path, **training: object) -> LoadedRecipe:
    values = {
        "model": str(base),
        "method": {"name": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": str(rows), "eval": 0.2, "max_length": 64},
        "training": {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-2, **training},
        "evaluation": {"steps": 2},
        "output": str(output),
    }
    return validate(Document("test.yaml", values))


def go(loaded: LoadedRecipe, **options: bool) -> tuple[TrainResult, list[Event]]:
    events: list[Event] = []
    return run(loaded, Options(**options), events.append), events


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def interrupted_after(source: Path, target: Path, step: int) -> None:
    """A copy of a finished run as it was when it was killed after `step`."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "adapter")
    for later in checkpoints.steps(target / "checkpoints"):
        if later > step:
            shutil.rmtree(target / "checkpoints" / f"checkpoint-{later}")
    manifest = json.loads((target / "run.json").read_text())
    manifest["status"] = "running"
    (target / "run.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def finished(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, rows and the folder of an uninterrupted run that kept every checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    rows = folder / "rows.jsonl"
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"word {i}"},
                {"role": "assistant", "content": f"{i} word"},
            ]
        }
        for i in range(40)
    ]
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    go(recipe(base_model, rows, folder / "run", keep_checkpoints=9))
    return base_model, rows, folder / "run"


def test_a_resumed_run_equals_one_that_was_never_stopped(
    finished: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, rows, whole = finished
    interrupted_after(whole, tmp_path / "run", 4)
    result, _ = go(recipe(base, rows, tmp_path / "run", keep_checkpoints=9), resume=True)
    assert result.steps == 8
    assert weights(tmp_path / "run") == weights(whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert steps == [json.loads(line)["step"] for line in (whole / "metrics.jsonl").open()]


def test_the_seconds_of_a_resumed_run_are_those_of_both_parts(
    finished: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, rows, whole = finished
    interrupted_after(whole, tmp_path / "run", 4)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    slow = [
        {**line, "seconds": 3600.0 + line["step"]} if "loss" in line else line for line in lines
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in slow))
    result, _ = go(recipe(base, rows, tmp_path / "run", keep_checkpoints=9), resume=True)
    told = [json.loads(line).get("seconds", 0) for line in metrics.read_text().splitlines()]
    assert 3604 < max(told) <= result.seconds < 3604 + 600


def damage(checkpoint: Path, how: str) -> None:
    file = checkpoint / "optimizer.pt"
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "one bit":
        content = bytearray((checkpoint / "adapter_model.safetensors").read_bytes())
        content[-5] ^= 1
        (checkpoint / "adapter_model.safetensors").write_bytes(content)
    elif how == "no manifest":
        (checkpoint / checkpoints.MANIFEST).unlink()


@pytest.mark.parametrize("how", ["missing", "cut", "one bit", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_and_named(
    finished: tuple[Path, Path, Path], tmp_path: Path, how: str
) -> None:
    base, rows, whole = finished
    interrupted_after(whole, tmp_path / "run", 6)
    damage(tmp_path / "run" / "checkpoints" / "checkpoint-6", how)
    _, events = go(recipe(base, rows, tmp_path / "run", keep_checkpoints=9), resume=True)
    told = [event.text for event in events if isinstance(event, Warned)]
    assert any("checkpoint-6 is skipped" in text for text in told)
    assert weights(tmp_path / "run") == weights(whole)


def test_when_every_checkpoint_is_damaged_nothing_starts_again_by_itself(
    finished: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, rows, whole = finished
    interrupted_after(whole, tmp_path / "run", 6)
    for step in checkpoints.steps(tmp_path / "run" / "checkpoints"):
        damage(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}", "missing")
    with pytest.raises(ArtefactError, match="every checkpoint is damaged"):
        go(recipe(base, rows, tmp_path / "run", keep_checkpoints=9), resume=True)


def test_what_changed_is_listed_and_refused_until_forced(
    finished: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, rows, whole = finished
    interrupted_after(whole, tmp_path / "run", 4)
    changed = tmp_path / "rows.jsonl"
    changed.write_text(rows.read_text().replace("word 3", "word three"))
    again = recipe(base, changed, tmp_path / "run", keep_checkpoints=9, learning_rate=5e-3)
    with pytest.raises(UsageError) as caught:
        go(again, resume=True)
    assert "training.learning_rate was 0.01, is 0.005" in caught.value.message
    assert "the content of the data files changed" in caught.value.message
    go(again, resume=True, force=True)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(manifest["resumed_with_changes"]) >= 2


def test_rotation_keeps_best_and_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.rotate(tmp_path, 2, best_step=1)
    assert sorted(checkpoints.steps(tmp_path)) == [1, 4]
    checkpoints.rotate(tmp_path, 1, best_step=1)
    assert sorted(checkpoints.steps(tmp_path)) == [1, 4]


def write_recipe(base: Path, rows: Path, folder: Path, steps: int) -> Path:
    file = folder / "r.yaml"
    file.write_text(
        f"model: {base}\nmethod: {{name: lora, rank: 4}}\n"
        f"data: {{train: {rows}, eval: 20%, max_length: 64}}\n"
        f"training: {{max_steps: {steps}, batch_size: 4}}\n"
        f"evaluation: {{steps: 10}}\noutput: {folder / 'run'}\n"
    )
    return file


def start(file: Path, *more: str) -> Running:
    return server().start("train", file, "--json", *more, cwd=file.parent)


def wait_for_step(process: Running, step: int) -> None:
    for line in process.lines():
        event = json.loads(line)
        if event["event"] == "step" and event["step"] >= step:
            return
    raise AssertionError(f"the run ended: {process.end()}")


def test_a_signal_saves_exits_75_and_resume_finishes(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    file = write_recipe(base_model, rows, tmp_path, 400)
    process = start(file)
    wait_for_step(process, 5)
    process.send(signal.SIGTERM)
    began = time.monotonic()
    ended = process.end()
    assert time.monotonic() - began < 30
    assert ended.returncode == 75, ended
    assert "--resume goes on" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "run" / "adapter").exists()
    saved = max(checkpoints.steps(tmp_path / "run" / "checkpoints"))
    done = start(write_recipe(base_model, rows, tmp_path, 400), "--resume")
    wait_for_step(done, saved + 1)
    done.send(signal.SIGKILL)
    assert done.end().returncode == -signal.SIGKILL
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sorted(set(steps)) == list(range(1, max(steps) + 1))
