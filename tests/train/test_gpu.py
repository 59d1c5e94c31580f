"""The same runs on a real GPU: every method, resume within a tolerance, and what does not fit."""

from __future__ import annotations

import gc
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_full_backward_hook
from transformers import AutoModelForCausalLM

from peftcli.errors import ResourceError
from peftcli.events import Event, Step
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.train import attention, checkpoints
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
    base: Path,
    rows: Path,
    output: Path,
    method: object,
    dtype: str = "auto",
    **training: object,
) -> LoadedRecipe:
    steps = {"max_steps": 8, "batch_size": 8, "learning_rate": 5e-3, "device": "cuda"}
    values = {
        "model": {"name": str(base), "dtype": dtype},
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


@pytest.mark.parametrize("name", ["lora", "qlora", "adapter"])
def test_a_card_before_ampere_learns_in_float16(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(attention, "FLASH_FROM", 999)  # above this card
    events: list[Event] = []
    asked = recipe(base_model, rows, tmp_path / "run", METHODS[name], dtype="float16")
    run(asked, Options(), events.append)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_thread_that_trains_goes_backward_too(
    base_model: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    threads: list[int] = []
    hook = register_module_full_backward_hook(lambda *_: threads.append(threading.get_ident()))
    try:
        run(
            recipe(base_model, rows, tmp_path / "run", METHODS[name]), Options(), lambda event: None
        )
    finally:
        hook.remove()
    assert set(threads) == {threading.get_ident()}


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
    with pytest.raises(ResourceError, match=r"has 0\.0 GiB free"):
        run(loaded, Options(), lambda event: None)


@pytest.fixture
def many_rows(tmp_path: Path) -> Path:
    """Enough rows for one batch that takes hundreds of megabytes."""
    file = tmp_path / "many.jsonl"
    with file.open("w") as stream:
        for i in range(600):
            turns = [("user", f"say {i} again and again"), ("assistant", f"{i} " * 12)]
            messages = [{"role": role, "content": text} for role, text in turns]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.mark.parametrize("on_oom", ["stop", "shrink"])
def test_a_run_that_runs_out_of_memory(
    base_model: Path, many_rows: Path, tmp_path: Path, on_oom: str
) -> None:
    """The process may use three fifths of what the run needs; the longest rows show it at once."""
    size = {"batch_size": 256, "micro_batch_size": 256, "max_steps": 3, "on_oom": on_oom}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    run(recipe(base_model, many_rows, tmp_path / "a", METHODS["lora"], **size), Options(), _silent)
    needed = torch.cuda.max_memory_reserved() - before
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 0.6 * needed
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    loaded = recipe(base_model, many_rows, tmp_path / "b", METHODS["lora"], **size)
    events: list[Event] = []
    try:
        if on_oom == "stop":
            with pytest.raises(ResourceError, match="ran out of memory at step 1") as caught:
                run(loaded, Options(), events.append)
            assert "estimated, in GiB" in caught.value.message
            assert "training.micro_batch_size: 1 (saves" in caught.value.hint
            assert not [event for event in events if isinstance(event, Step)]
        else:
            assert run(loaded, Options(), events.append).steps == 3
            manifest = json.loads((tmp_path / "b" / "run.json").read_text())
            assert manifest["plan"]["micro_batch_size"] < 256
            assert manifest["shrunk"][0]["step"] == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_manifest_promises_no_bytes(base_model: Path, rows: Path, tmp_path: Path) -> None:
    run(recipe(base_model, rows, tmp_path / "run", METHODS["lora"]), Options(), _silent)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["deterministic"] is False


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_poisoned_row_reaches_no_parameter(
    base_model: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    """One letter of one row stands for nothing finite."""
    poisoned = tmp_path / "poisoned"
    shutil.copytree(base_model, poisoned)
    model = AutoModelForCausalLM.from_pretrained(base_model)
    tokens = json.loads((base_model / "tokenizer.json").read_text())["model"]["vocab"]
    model.model.embed_tokens.weight.data[tokens["Z"]] = math.nan
    model.save_pretrained(poisoned)
    lines = rows.read_text().splitlines()
    lines[20] = lines[20].replace("twice", "twiZce")
    rows.write_text("\n".join(lines) + "\n")
    events: list[Event] = []
    training = {"on_nonfinite": "skip", "max_steps": 10, "batch_size": 4}
    loaded = recipe(poisoned, rows, tmp_path / "run", METHODS[name], **training)
    run(loaded, Options(), events.append)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert sum(not math.isfinite(loss) for loss in losses) <= 2
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())
    assert losses[-1] < losses[0]


def _silent(event: Event) -> None:
    """Nobody listens."""


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
    assert "no change of the recipe is enough" in caught.value.hint  # 4 bits are too large too
