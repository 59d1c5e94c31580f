"""Signals: at any moment exit 75 within a bounded time, nothing half-finished, a whole resume."""

from __future__ import annotations

import json
import random
import signal
import time
from importlib.resources import files
from pathlib import Path

import pytest
from faults.lab import Fault, Lab, Send
from faults.operations import check_operation
from faults.scene import Scene, adapter, again, check_no_half_result, check_same_result, steps_of

from peftcli.train import checkpoints

BOUND = 25.0  # seconds: a spot machine gives 30, and this one is slow


def status(output: Path) -> str:
    return str(json.loads((output / "run.json").read_text())["status"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_while_stepping(lab: Lab, scene: Scene, number: signal.Signals) -> None:
    output = scene.output()
    many = {"training": {"max_steps": 400, "save_steps": 200}, "evaluation": {"steps": 200}}
    send = Send(number, seen='"event": "step", "step": 2,')
    stopped = lab.run("train", scene.recipe(output, **many), "--json", cwd=scene.folder, send=send)
    assert stopped.code == 75, stopped.errors
    assert stopped.stopped_after is not None
    assert stopped.stopped_after < BOUND
    assert "Traceback" not in stopped.errors
    assert f"stopped by {number.name} after step" in stopped.errors
    assert status(output) == "interrupted"
    assert not (output / "adapter").exists()
    saved = max(checkpoints.steps(output / "checkpoints"))
    assert f'"step": {saved},' in stopped.output  # the step that was running is not lost
    assert max(step for step, _ in steps_of(output)) == saved


def test_at_sampled_operations(exact: Lab, scene: Scene) -> None:
    """While a checkpoint, the metrics, the manifest or the result is being written."""
    chance = random.Random(time.strftime("%Y-%j"))
    for part in range(5):
        number = int(scene.operations * (part + chance.random()) / 5) + 1
        check_operation(exact, scene, Fault("terminate", number))


@pytest.fixture(scope="module")
def long_evaluation(lab: Lab, scene: Scene) -> tuple[dict[str, object], Path]:
    """A recipe whose evaluations take much longer than its steps, and its uninterrupted run."""
    rows = scene.folder / "many.jsonl"
    rows.write_text((files("peftcli.bundled") / "data" / "quickstart.eval.jsonl").read_text())
    changes: dict[str, object] = {
        "data": {"eval": str(rows)},
        "training": {"max_steps": 2, "save_steps": 1},
        "evaluation": {"steps": 1, "batch_size": 1, "early_stopping": 1},
    }
    output = scene.output()
    done = lab.run("train", scene.recipe(output, **changes), "--json", cwd=scene.folder)
    assert done.code == 0, done.errors
    return changes, output


def test_while_evaluating(
    lab: Lab, scene: Scene, long_evaluation: tuple[dict[str, object], Path]
) -> None:
    """The step is saved although nobody looked at it, and looked at first after a resume."""
    changes, whole = long_evaluation
    output = scene.output()
    send = Send(signal.SIGTERM, seen='"event": "step", "step": 1,', after=0.1)
    recipe = scene.recipe(output, **changes)
    stopped = lab.run("train", recipe, "--json", cwd=scene.folder, send=send)
    assert stopped.code == 75, stopped.errors
    assert stopped.stopped_after is not None
    assert stopped.stopped_after < BOUND
    assert '"event": "evaluated"' not in stopped.output
    assert (output / "checkpoints" / "checkpoint-1" / checkpoints.UNEVALUATED).exists()
    assert steps_of(output) == [(1, "train")]
    resumed = again(lab, scene, output, **changes)
    assert resumed.code == 0, resumed.errors
    assert steps_of(output) == steps_of(whole)
    assert adapter(output) == adapter(whole)
    state = [
        json.loads((run / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
        for run in (output, whole)
    ]
    assert state[0]["best_metric"] == state[1]["best_metric"]


def test_while_tokenising(lab: Lab, scene: Scene) -> None:
    """Nothing has begun: the same command starts again."""
    rows = scene.folder / "large.jsonl"
    lines = (scene.folder / "train.jsonl").read_text().splitlines()
    with rows.open("w") as stream:
        for i in range(60_000):
            stream.write(lines[i % len(lines)].replace("content", "content", 1) + "\n")
    output = scene.output()
    recipe = scene.recipe(output, data={"train": str(rows)})
    send = Send(signal.SIGTERM, after=1.5)
    stopped = lab.run("train", recipe, "--json", cwd=scene.folder, send=send)
    assert stopped.code == 75, stopped.errors
    assert stopped.stopped_after is not None
    assert stopped.stopped_after < BOUND
    assert "before the first step; nothing was changed" in stopped.errors
    assert "Traceback" not in stopped.errors
    assert not (output / "run.json").exists()
    assert not (output / "checkpoints").exists()
    small = lab.run("train", scene.recipe(output), "--json", cwd=scene.folder)
    assert small.code == 0, small.errors
    check_same_result(scene, output)


def test_a_second_ctrl_c_ends_at_once(lab: Lab, scene: Scene) -> None:
    """The step that runs is given up, and what was complete stays complete."""
    output = scene.output()
    slow = {"max_steps": 40, "batch_size": 128, "micro_batch_size": 8, "save_steps": 1}
    changes = {"training": slow, "data": {"train": "bundled:quickstart.train", "eval": None}}
    send = Send(signal.SIGINT, seen='"event": "saved", "step": 1,', after=0.2, again=0.2)
    recipe = scene.recipe(output, **changes)
    stopped = lab.run("train", recipe, "--json", cwd=scene.folder, send=send)
    assert stopped.code == 75
    assert stopped.stopped_after is not None
    assert stopped.stopped_after < 0.2 + 2.0
    assert "finishing this step" in stopped.output
    assert '"event": "step", "step": 2,' not in stopped.output
    check_no_half_result(output)
    assert checkpoints.steps(output / "checkpoints") == [1]
    send = Send(signal.SIGTERM, seen='"event": "step", "step": 2,')
    resumed = lab.run("train", recipe, "--json", "--resume", cwd=scene.folder, send=send)
    assert resumed.code == 75, resumed.errors
    assert [step for step, _ in steps_of(output)][:2] == [1, 2]


def test_nobody_listens_any_more(lab: Lab, scene: Scene) -> None:
    """A log on a full disk does not end a run that took a night."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    output = scene.output()
    done = lab.run("train", scene.recipe(output), "--json", cwd=scene.folder, stdout=str(full))
    assert "Traceback" not in done.errors
    check_same_result(scene, output)
