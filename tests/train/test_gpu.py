"""The same runs on a real GPU: every method, resume within a tolerance, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftcli.errors import ResourceError
from peftcli.events import Event, Step
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.train import checkpoints
from peftcli.train.run import Options, run

pytestmark = pytest.mark.gpu

METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "use_dora": True},
    "qlora": {"name": "qlora", "rank": 4},
    "adapter": {"name": "adapter", "bottleneck_size": 8},
    "adapter nf4": {"name": "adapter", "bottleneck_size": 8, "quantization": "nf4"},
    "full": {"name": "full"},
}


def recipe(
    base: Path, rows: Path, output: Path, method: object, **training: object
) -> LoadedRecipe:
    steps = {"max_steps": 8, "batch_size": 8, "learning_rate": 5e-3, "device": "cuda"}
    values = {
        "model": str(base),
        "method": method,
        "data": {"train": str(rows), "eval": 0.2, "max_length": 64},
        "training": {**steps, **training},
        "evaluation": {"steps": 4},
        "output": str(output),
    }
    return validate(Document("test.yaml", values))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_learns(base_model: Path, rows: Path, tmp_path: Path, method: object) -> None:
    events: list[Event] = []
    result = run(recipe(base_model, rows, tmp_path / "run", method), Options(), events.append)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert losses[-1] < losses[0]
    assert 0 < result.peak_memory_gib < 2
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["device"]["kind"] == "cuda"


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_resumed_run_is_close_to_one_that_was_never_stopped(
    base_model: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    loaded = recipe(base_model, rows, tmp_path / "run", METHODS[name], keep_checkpoints=9)
    run(loaded, Options(), lambda event: None)
    whole = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-8")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**manifest, "status": "running"}))
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [4]
    run(loaded, Options(resume=True), lambda event: None)
    again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for key, tensor in whole.items():
        torch.testing.assert_close(again[key], tensor, rtol=0, atol=2e-3)


def test_a_run_keeps_to_its_memory_limit(base_model: Path, rows: Path, tmp_path: Path) -> None:
    loaded = recipe(base_model, rows, tmp_path / "run", METHODS["lora"], memory_limit_gib=0.001)
    with pytest.raises(ResourceError, match="has 0.0 GiB free"):
        run(loaded, Options(), lambda event: None)


def test_a_run_that_cannot_fit_stops_before_the_weights(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(base_model, huge)
    (huge / "model.safetensors").unlink()
    config = json.loads((huge / "config.json").read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128}
    (huge / "config.json").write_text(json.dumps(config))
    with pytest.raises(ResourceError, match="this run needs about") as caught:
        run(recipe(huge, rows, tmp_path / "run", {"name": "lora"}), Options(), lambda event: None)
    assert "method.name: qlora" in caught.value.hint or "write one of" in caught.value.hint
