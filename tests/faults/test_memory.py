"""Out of memory: found in the first minute, explained, and survived when the recipe says so."""

from __future__ import annotations

import json
import os
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.lab import Lab
from faults.scene import Scene, check_no_half_result, steps_of
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from peftcli.architecture.config import architecture_from
from peftcli.errors import ExitCode, InterruptedRun, ResourceError
from peftcli.estimate.gpus import find_gpu
from peftcli.estimate.result import Rows
from peftcli.estimate.run import run as estimate_run
from peftcli.events import Event, Note, Step, Warned
from peftcli.models import load_config
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.run_dir import RunDir
from peftcli.train import checkpoints
from peftcli.train.refusals import out_of_memory
from peftcli.train.run import Options, run
from peftcli.train.setting import settle

STEPS = 6


def recipe(base: Path, rows: Path, output: Path, **training: object) -> LoadedRecipe:
    size = {"batch_size": 8, "micro_batch_size": 8, "max_steps": STEPS, "learning_rate": 1e-2}
    values = {
        "model": str(base),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(rows), "eval": 0.2, "max_length": 64},
        "training": {**size, "save_steps": 3, **training},
        "evaluation": {"steps": training.get("save_steps", 3)},
        "output": str(output),
    }
    return validate(Document("test.yaml", values))


@contextmanager
def small_card(tokens: int, calls: int = 0) -> Iterator[None]:
    """A device on which a forward pass of more than `tokens` tokens fails, after some that did not.

    PyTorch calls the hook before every module's forward pass and raises its own error.
    """
    seen = 0

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal seen
        if not isinstance(module, torch.nn.Embedding) or not torch.is_grad_enabled():
            return
        seen += 1
        if seen > calls and inputs[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Mark:
    """Lives as long as the graph that it is put into."""


@contextmanager
def small_card_going_backward(tokens: int) -> Iterator[list[weakref.ref[Mark]]]:
    """A device on which a backward pass over more than `tokens` tokens fails in its last MLP.

    The gradient of `gate` waits while that of `up` is found. Gives marks of the graphs that failed.
    """
    marks: list[weakref.ref[Mark]] = []

    def fail(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def after(up: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        output.register_hook(fail)

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        large = isinstance(module, LlamaMLP) and inputs[0].shape[:-1].numel() > tokens
        if not large or not torch.is_grad_enabled():
            return
        mark = inputs[0].grad_fn.metadata["mark"] = Mark()
        marks.append(weakref.ref(mark))
        module.up_proj.register_forward_hook(after)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield marks
    finally:
        handle.remove()


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def whole(base_model: Path, rows: Path, tmp_path: Path) -> Path:
    """A run that fits."""
    output = tmp_path / "whole"
    run(recipe(base_model, rows, output), Options(), lambda event: None)
    return output


def test_it_stops_with_a_checkpoint_of_the_last_step(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "run"
    loaded = recipe(base_model, rows, output)
    with small_card(100, calls=4), pytest.raises(ResourceError) as caught:
        run(loaded, Options(), lambda event: None)
    assert caught.value.exit_code == ExitCode.RESOURCES == 3
    assert "ran out of memory at step 5" in caught.value.message
    assert "with 8 rows of up to" in caught.value.message
    assert "training.on_oom: shrink" in caught.value.hint
    assert "--resume goes on from checkpoint-4" in caught.value.hint
    assert json.loads((output / "run.json").read_text())["status"] == "failed"
    check_no_half_result(output)
    run(loaded, Options(resume=True), lambda event: None)
    assert weights(output).keys() == weights(whole).keys()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(output)[name])


def test_shrinking_goes_on_from_the_last_step(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path
) -> None:
    output, events = tmp_path / "run", list[Event]()
    loaded = recipe(base_model, rows, output, on_oom="shrink")
    with small_card(130, calls=4):
        result = run(loaded, Options(), events.append)
    assert result.steps == STEPS
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert any("out of memory at step 5 with 8 rows" in text for text in warned)
    manifest = json.loads((output / "run.json").read_text())
    assert manifest["shrunk"][0] == {"step": 4, "from": 8, "to": 4}
    assert manifest["plan"]["micro_batch_size"] * manifest["plan"]["accumulation"] == 8
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4, 5, 6]
    assert steps_of(output) == steps_of(whole)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(output)[name], tensor, rtol=2e-3, atol=2e-4)


def test_nothing_of_a_backward_pass_that_failed_is_left(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    """Neither its activations nor the model, which is loaded once more."""
    loaded = recipe(base_model, rows, tmp_path / "run", on_oom="shrink", kernels="plain")
    left: list[int] = []
    with small_card_going_backward(130) as marks:

        def count(event: Event) -> None:
            if isinstance(event, Warned) and "out of memory" in event.text:
                left.append(sum(mark() is not None for mark in marks))

        assert run(loaded, Options(), count).steps == STEPS
    assert len(marks) > 1
    assert left == [0]


def test_shrinking_before_the_first_step_and_down_to_one_row(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "run"
    with small_card(64):
        run(recipe(base_model, rows, output, on_oom="shrink"), Options(), lambda event: None)
    changes = json.loads((output / "run.json").read_text())["shrunk"]
    assert changes[0] == {"step": 0, "from": 8, "to": 4}
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(output)[name], tensor, rtol=2e-3, atol=2e-4)


def test_when_one_row_does_not_fit_there_is_nothing_to_shrink(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    loaded = recipe(base_model, rows, tmp_path / "run", on_oom="shrink")
    with small_card(8), pytest.raises(ResourceError, match="with 1 row of up to"):
        run(loaded, Options(), lambda event: None)


def test_a_shrunk_run_resumes_with_what_it_had_come_to(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    loaded = recipe(base_model, rows, output, on_oom="shrink")

    def stop_at_four(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with small_card(130, calls=2), pytest.raises(InterruptedRun):
        run(loaded, Options(), stop_at_four)
    shrunk = json.loads((output / "run.json").read_text())["plan"]
    assert shrunk["micro_batch_size"] < 8
    run(loaded, Options(resume=True), lambda event: None)
    manifest = json.loads((output / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["plan"]["micro_batch_size"] == shrunk["micro_batch_size"]


def test_the_longest_rows_run_first_and_change_nothing(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path
) -> None:
    output, events = tmp_path / "run", list[Event]()
    run(recipe(base_model, rows, output), Options(probe_on_cpu=True), events.append)
    told = [i for i, e in enumerate(events) if isinstance(e, Note) and "longest batch" in e.text]
    assert told
    assert told[0] < next(i for i, event in enumerate(events) if isinstance(event, Step))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(output)[name])
    assert steps_of(output) == steps_of(whole)


def test_dropout_does_not_notice_the_longest_rows(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    method = {"name": "lora", "rank": 4, "dropout": 0.2}
    found = []
    for probe in (False, True):
        output = tmp_path / f"run-{probe}"
        values = dict(recipe(base_model, rows, output).recipe.model_dump(exclude_unset=True))
        loaded = validate(Document("t", {**values, "method": method}))
        run(loaded, Options(probe_on_cpu=probe), lambda event: None)
        found.append((output / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_what_does_not_fit_fails_before_the_first_step(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    """One row is longer than all others: without the probe it might come hours later."""
    long = {"messages": [{"role": "user", "content": "a" * 40}]}
    long["messages"].append({"role": "assistant", "content": "b" * 20})
    rows.write_text(rows.read_text() + json.dumps(long) + "\n")
    loaded = recipe(base_model, rows, tmp_path / "run", micro_batch_size=1)
    events: list[Event] = []
    with small_card(60), pytest.raises(ResourceError, match="out of memory at step 1"):
        run(loaded, Options(probe_on_cpu=True), events.append)
    assert not [event for event in events if isinstance(event, Step)]


def test_memory_that_the_system_refuses(lab: Lab, scene: Scene) -> None:
    """A real limit on the address space of the process."""
    output = scene.output()
    large = {"batch_size": 24, "micro_batch_size": 24}
    file = scene.recipe(output, training=large)
    outcome = lab.run("train", file, "--json", cwd=scene.folder, limits={"AS": 24 << 20})
    assert outcome.code == 3, outcome.errors
    assert "Traceback" not in outcome.errors
    assert "memory" in outcome.errors


def test_the_message_says_where_memory_went_and_what_to_change(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    loaded = recipe(base_model, rows, tmp_path / "run", checkpointing="none")
    setting = settle(loaded, lambda event: None)
    wide = load_config(loaded.recipe.model).to_dict()
    wide |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    estimate = estimate_run(
        loaded.recipe,
        find_gpu("RTX 4090"),
        rows=Rows(40, 64, 40.0),
        architecture=architecture_from(wide, "wide"),
        always_advise=True,
    )
    assert estimate.verdict == "fits"  # it was wrong, so it still has to say what to change
    error = out_of_memory(setting, RunDir(tmp_path / "run"), 6, replace(estimate))
    assert "ran out of memory at step 7" in error.message
    assert "estimated, in GiB: base, not quantised" in error.message
    assert "activations" in error.message
    assert len(estimate.changes) == 3
    for change in estimate.changes:
        assert f"{change.line} (saves {change.saves_gib:.1f} GiB)" in error.hint


def test_no_checkpoint_is_half_written_by_it(base_model: Path, rows: Path, tmp_path: Path) -> None:
    loaded = recipe(base_model, rows, tmp_path / "run", save_steps=1)
    with small_card(100, calls=3), pytest.raises(ResourceError):
        run(loaded, Options(), lambda event: None)
    folder = tmp_path / "run" / "checkpoints"
    assert max(checkpoints.steps(folder)) == 3
    check_no_half_result(tmp_path / "run")
