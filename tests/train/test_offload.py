"""`training.checkpointing: offload`: who may write it, who gets it, and what it asks for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli.architecture.catalog import find_model
from peftcli.errors import RecipeError, ResourceError, UsageError
from peftcli.estimate.gpus import unknown_gpu
from peftcli.estimate.run import run as estimate
from peftcli.events import Event, Note, Warned
from peftcli.machine import free_host_memory
from peftcli.methods import VARIANTS
from peftcli.models import Device
from peftcli.recipe.checks import check_architecture
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.run_dir import RunDir
from peftcli.train.begin import _still_shrunk
from peftcli.train.kernels import fast_model
from peftcli.train.plan import Plan, gpu_load, smaller
from peftcli.train.refusals import refuse_what_cannot_fit
from peftcli.train.run import Options, run
from peftcli.train.setting import Setting, settle

OFFLOAD = {"checkpointing": "offload"}


def recipe(training: Any = OFFLOAD, **sections: Any) -> LoadedRecipe:
    values = {
        "model": "meta-llama/Llama-3.1-8B",
        "method": "lora",
        "data": {"train": "rows.jsonl"},
        "output": "run",
        "training": training,
    }
    return validate(Document("test.yaml", {**values, **sections}))


CLASHES = {
    "training.kernels": {"training": {**OFFLOAD, "kernels": "plain"}},
    "training.neftune_noise_alpha": {"training": {**OFFLOAD, "neftune_noise_alpha": 5}},
    "model.attention": {"model": {"name": "m", "attention": "sdpa"}},
    "model.dtype": {"model": {"name": "m", "dtype": "float16"}},
}


@pytest.mark.parametrize("key", CLASHES)
def test_what_keeps_the_fused_layers_away_is_refused_at_its_place(key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**CLASHES[key])
    assert f"{key}: `training.checkpointing: offload` needs" in caught.value.message
    with pytest.raises(RecipeError, match="offload"):
        recipe({"checkpointing": "disk"})


REFUSED = {
    "google/gemma-2-9b": ("lora", "offload runs on llama, mistral, phi3, qwen2, qwen3 models"),
    "Qwen/Qwen3-8B": ({"name": "lora", "use_dora": True}, "leave out what lora does here"),
    "meta-llama/Llama-3.1-8B": ("full", "leave out what full does here"),
}


@pytest.mark.parametrize("model", REFUSED)
def test_models_and_methods_without_fused_layers_are_refused(model: str) -> None:
    method, why = REFUSED[model]
    architecture = find_model(model)
    assert architecture is not None
    with pytest.raises(RecipeError) as caught:
        check_architecture(recipe(model=model, method=method), architecture)
    assert why in caught.value.message
    assert "training.checkpointing: offload" in caught.value.message
    assert "write `full`" in caught.value.message
    full = recipe({"checkpointing": "full"}, model=model, method=method)
    check_architecture(full, architecture)


@pytest.mark.parametrize("name", ["lora", "qlora", "adapter"])
def test_fused_methods_may_have_it(name: str) -> None:
    architecture = find_model("meta-llama/Llama-3.1-8B")
    assert architecture is not None
    assert name in VARIANTS
    check_architecture(recipe(method=name), architecture)


def test_what_the_fused_layers_leave_out_is_refused_and_not_run_plainly() -> None:
    from tiny_models import tiny_model

    model = tiny_model("llama")
    with pytest.raises(UsageError) as caught:  # all its weights are trained
        fast_model(model, True, offload=True)
    assert "training.checkpointing: offload runs on fused layers, which leave" in str(caught.value)
    assert caught.value.hint == "write `full`"
    assert fast_model(model, True)[0] is None


def trained(base: Path, rows: Path, output: Path, mode: str) -> list[Event]:
    events: list[Event] = []
    training = {"checkpointing": mode, "max_steps": 3, "batch_size": 4, "device": "cpu"}
    values = {"model": str(base), "data": {"train": str(rows)}, "output": str(output)}
    run(recipe(training, **values), Options(), events.append)
    return events


def test_on_a_cpu_it_is_full_and_says_so(base_model: Path, rows: Path, tmp_path: Path) -> None:
    events = trained(base_model, rows, tmp_path / "one", "offload")
    notes = [event.text for event in events if isinstance(event, Note)]
    assert "checkpointing full: on a CPU the layers' inputs are in host memory anyway" in notes
    plan = json.loads((tmp_path / "one" / "run.json").read_text())["plan"]
    assert (plan["checkpointing"], plan["offload"]) == (True, False)
    trained(base_model, rows, tmp_path / "two", "full")
    file = Path("adapter") / "adapter_model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


def test_a_gpu_gets_what_the_estimate_chose_or_the_recipe_says() -> None:
    long = {"data": {"train": "rows.jsonl", "max_length": 131_072}, "method": "qlora"}
    for mode, length_too in (("auto", True), ("offload", False)):
        asked = recipe({"checkpointing": mode}, **(long if length_too else {})).recipe
        load = gpu_load(asked, estimate(asked, unknown_gpu(24)))
        assert load.mode == "offload"
        told = [text for text in load.reasons if text.startswith("checkpointing offload: the fas")]
        assert len(told) == (mode == "auto")
        assert any("GiB of host memory for the layers' inputs" in text for text in load.reasons)


def plan(rows: int, mode: str) -> Plan:
    return Plan(
        micro_batch_size=rows,
        accumulation=8 // rows,
        checkpointing=mode != "none",
        offload=mode == "offload",
        lowest=None,
        packing=False,
        steps=10,
        warmup_steps=0,
        eval_steps=None,
        save_steps=5,
        reasons=(),
    )


def test_shrinking_ends_in_host_memory_where_layers_are_fused() -> None:
    assert smaller(plan(4, "full"), offload=True) == plan(2, "full")
    assert smaller(plan(1, "full"), offload=True) == plan(1, "offload")
    assert smaller(plan(2, "offload"), offload=True) == plan(1, "offload")
    assert smaller(plan(1, "offload"), offload=True) is None
    assert smaller(plan(1, "full"), offload=False) is None
    assert smaller(plan(1, "none"), offload=True) is None


def setting(base: Path, rows: Path, **training: Any) -> Setting:
    values = {"model": str(base), "data": {"train": str(rows)}}
    loaded = recipe({"device": "cpu", "batch_size": 8, **training}, **values)
    return settle(loaded, lambda event: None)


def test_a_resumed_run_keeps_what_it_had_come_to(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    folder = RunDir(tmp_path)
    now, loaded = setting(base_model, rows), recipe({"batch_size": 8}).recipe
    before = {"micro_batch_size": 1, "checkpointing": True, "offload": True}
    found = _still_shrunk(loaded, now, folder, before).plan
    assert (found.micro_batch_size, found.accumulation, found.mode) == (1, 8, "offload")
    older = {"micro_batch_size": 2, "checkpointing": True}  # written before there was offload
    found = _still_shrunk(loaded, now, folder, older).plan
    assert (found.micro_batch_size, found.mode) == (2, now.plan.mode)


def test_a_machine_with_too_little_host_memory_is_told(base_model: Path, rows: Path) -> None:
    card = unknown_gpu(10**6)
    training = {**OFFLOAD, "batch_size": 1024, "micro_batch_size": 1024}
    long = {"data": {"train": "rows.jsonl", "max_length": 131_072}}
    found = estimate(recipe(training, **long).recipe, card)
    assert found.verdict == "fits"
    assert found.memory.host_gib == 1024 * 30
    assert free_host_memory() < 1024 * 30 * 2**30
    device = Device("cuda", "bfloat16", card.name, card.memory / 2**30)
    now = replace(setting(base_model, rows), estimate=found, device=device)
    with pytest.raises(ResourceError, match=r"offload puts about 30720\.0 GiB into host") as caught:
        refuse_what_cannot_fit(now, lambda event: None, force=False)
    assert "--force tries anyway" in caught.value.hint
    events: list[Event] = []
    refuse_what_cannot_fit(now, events.append, force=True)
    assert isinstance(events[0], Warned)
    short = estimate(recipe({**OFFLOAD, "batch_size": 1}).recipe, card)
    refuse_what_cannot_fit(replace(now, estimate=short), events.append, force=False)
    assert len(events) == 1


LONG = {"data": {"train": "rows.jsonl", "max_length": 131_072}, "method": "qlora"}


def test_auto_takes_host_memory_only_where_there_is_enough() -> None:
    auto, card = recipe({"checkpointing": "auto"}, **LONG).recipe, unknown_gpu(24)
    elsewhere = estimate(auto, card)
    needed = elsewhere.memory.host_gib
    assert elsewhere.settings.checkpointing == "offload"
    assert estimate(auto, card, host_gib=needed).settings.checkpointing == "offload"
    short = estimate(auto, card, host_gib=needed - 0.1)
    assert short.settings.checkpointing == "full"
    assert not short.holds
    assert short.offload_needs_gib == needed
    assert all("offload" not in change.line for change in short.changes)
    assert (elsewhere.offload_needs_gib, estimate(auto, unknown_gpu(4)).offload_needs_gib) == (0, 0)


def test_fewer_rows_at_a_time_where_the_host_has_too_little_for_more() -> None:
    short = {"data": {"train": "rows.jsonl", "max_length": 512}, "method": "qlora"}
    fixed = recipe({**OFFLOAD, "batch_size": 4}, **short).recipe
    card = unknown_gpu(80)
    most = estimate(fixed, card)
    assert most.settings.micro_batch_size > 1
    one = most.memory.host_gib / most.settings.micro_batch_size
    fewer = estimate(fixed, card, host_gib=one)
    assert (fewer.verdict, fewer.settings.micro_batch_size) == ("fits", 1)
    assert estimate(fixed, card, host_gib=0.0).memory.host_gib == one  # for `train` to refuse


def test_offload_is_advised_only_where_the_host_has_the_memory() -> None:
    full = recipe({"checkpointing": "full"}, **LONG).recipe
    found = [estimate(full, unknown_gpu(24), host_gib=gib) for gib in (1000.0, 1.0)]
    told = [any("offload" in change.line for change in each.changes) for each in found]
    assert told == [True, False]


def test_a_run_that_only_offload_would_save_is_told_what_the_host_lacks(
    base_model: Path, rows: Path
) -> None:
    card = unknown_gpu(24)
    found = estimate(recipe({"checkpointing": "auto"}, **LONG).recipe, card, host_gib=1.0)
    device = Device("cuda", "bfloat16", card.name, card.memory / 2**30)
    now = replace(setting(base_model, rows), estimate=found, device=device)
    missing = f"it would fit, which puts about {found.offload_needs_gib:.1f} GiB into host memory"
    with pytest.raises(ResourceError, match=f"24.0 GiB free; .*{missing}, and .* GiB are free"):
        refuse_what_cannot_fit(now, lambda event: None, force=False)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_on_a_gpu_ends_where_full_ends(
    base_model: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    """Evaluations and a longest batch before the first step included."""
    deep = tmp_path / "deep"
    shutil.copytree(base_model, deep)
    config = LlamaConfig.from_pretrained(deep)
    config.num_hidden_layers = 6
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(deep)
    found = []
    for mode in ("full", "offload"):
        events: list[Event] = []
        training = {"checkpointing": mode, "max_steps": 6, "batch_size": 8, "device": "cuda"}
        values = {
            "model": str(deep),
            "method": method,
            "data": {"train": str(rows), "eval": 0.2},
            "evaluation": {"steps": 3},
            "output": str(tmp_path / mode),
        }
        run(recipe({**training, "micro_batch_size": 4}, **values), Options(), events.append)
        notes = [event.text for event in events if isinstance(event, Note)]
        assert any("inputs in host memory" in text for text in notes) == (mode == "offload")
        found.append(load_file(tmp_path / mode / "adapter" / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-4, msg=name)
