"""`training.checkpointing` as a number of layers: who may write it, and what it comes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_models import tiny_model

from peftcli.architecture.catalog import find_model
from peftcli.errors import RecipeError, UsageError
from peftcli.estimate.gpus import find_gpu, unknown_gpu
from peftcli.estimate.run import run as estimate
from peftcli.events import Event
from peftcli.models import Device
from peftcli.recipe.checks import check_architecture
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.run_dir import RunDir
from peftcli.train.begin import _still_shrunk
from peftcli.train.kernels import fast_model
from peftcli.train.plan import Load, Plan, decide, gpu_load, smaller
from peftcli.train.precision import check_precision
from peftcli.train.run import Options, run
from peftcli.train.setting import settle


def recipe(checkpointing: Any, **sections: Any) -> LoadedRecipe:
    values = {
        "model": "meta-llama/Llama-3.1-8B",
        "method": "qlora",
        "data": {"train": "rows.jsonl"},
        "output": "run",
        "training": {"checkpointing": checkpointing, **sections.pop("training", {})},
    }
    return validate(Document("test.yaml", {**values, **sections}))


@pytest.mark.parametrize("wrong", [0, -3, True, 2.5, "7"])
def test_what_is_no_number_of_layers_is_refused(wrong: Any) -> None:
    with pytest.raises(RecipeError, match=r"training\.checkpointing"):
        recipe(wrong)


def test_what_keeps_the_fused_layers_away_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"`training\.checkpointing: 7` needs `auto`"):
        recipe(7, training={"kernels": "plain"})
    gemma = find_model("google/gemma-2-9b")
    assert gemma is not None
    with pytest.raises(RecipeError, match="a number of layers runs on llama, mistral") as caught:
        check_architecture(recipe(7, model="google/gemma-2-9b"), gemma)
    assert "training.checkpointing" in caught.value.message
    with pytest.raises(UsageError, match=r"training\.checkpointing: 1 runs on fused layers"):
        fast_model(tiny_model("llama"), True, lowest=1)  # all its weights are trained


def test_more_layers_than_the_model_has_are_refused() -> None:
    llama = find_model("meta-llama/Llama-3.1-8B")
    assert llama is not None
    with pytest.raises(RecipeError, match=r"training\.checkpointing: 33 is above the 32 layers"):
        check_architecture(recipe(33), llama)
    check_architecture(recipe(32), llama)


def test_all_layers_are_full(base_model: Path, rows: Path) -> None:
    values = {"model": str(base_model), "data": {"train": str(rows)}, "method": "lora"}
    layers = json.loads((base_model / "config.json").read_text())["num_hidden_layers"]
    found = settle(recipe(layers, training={"device": "cpu"}, **values), lambda event: None)
    assert (found.plan.mode, found.plan.lowest) == ("full", None)
    assert sum(reason.startswith("checkpointing full: ") for reason in found.plan.reasons) == 1
    estimated = estimate(recipe(32).recipe, find_gpu("H100"))
    assert estimated.settings.checkpointing == "full"
    assert sum("`checkpointing: 32` is `full`" in note for note in estimated.notes) == 1


@pytest.mark.parametrize("mode", [7, "offload"])
def test_a_card_without_bfloat16_is_refused_before_the_weights_load(mode: Any) -> None:
    found = recipe(mode).recipe
    check_precision(found, Device("cuda", "bfloat16", "NVIDIA A100", 80.0))
    with pytest.raises(UsageError, match=f"checkpointing: {mode} runs on fused .* T4 computes in"):
        check_precision(found, Device("cuda", "float16", "T4", 15.0))
    check_precision(recipe("full").recipe, Device("cuda", "float16", "T4", 15.0))
    told = [
        any("`train` refuses" in x for x in estimate(found, find_gpu(card)).notes)
        for card in ("T4", "A100 80GB")
    ]
    assert told == [True, False]


def test_a_small_card_gets_as_few_as_it_asks_for() -> None:
    auto = recipe("auto").recipe
    load = gpu_load(auto, estimate(auto, unknown_gpu(12)))
    assert isinstance(load.mode, int)
    assert 0 < load.mode < 32
    assert any(reason.startswith(f"checkpointing {load.mode}: ") for reason in load.reasons)


def plan(rows: int, mode: Any) -> Plan:
    load = Load(rows, mode, ())
    values = recipe("auto", training={"batch_size": 8}).recipe
    return decide(values, rows=80, has_eval=False, packing=False, load=load)


def test_shrinking_goes_on_with_all_layers() -> None:
    assert plan(2, 7).mode == 7
    assert smaller(plan(2, 7), offload=True) == plan(1, 7)
    assert smaller(plan(1, 7), offload=True) == plan(1, "full")
    assert smaller(plan(1, "full"), offload=True) == plan(1, "offload")


def test_a_resumed_run_keeps_all_layers_where_it_had_come_to_that(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    values = {"model": str(base_model), "data": {"train": str(rows)}, "method": "lora"}
    loaded = recipe(1, training={"device": "cpu", "batch_size": 8}, **values)
    now = settle(loaded, lambda event: None)
    assert now.plan.mode == 1
    before: dict[str, Any] = {"micro_batch_size": 1, "checkpointing": True, "offload": False}
    for lowest, mode in ((None, "full"), (1, 1)):
        found = _still_shrunk(loaded.recipe, now, RunDir(tmp_path), {**before, "lowest": lowest})
        assert found.plan.mode == mode


def test_a_run_learns_the_same(base_model: Path, rows: Path, tmp_path: Path) -> None:
    weights = []
    for mode in ("none", 1, "full"):
        output = tmp_path / str(mode)
        training = {"max_steps": 3, "batch_size": 4, "device": "cpu"}
        values = {"model": str(base_model), "data": {"train": str(rows)}, "output": str(output)}
        events: list[Event] = []
        run(recipe(mode, training=training, method="lora", **values), Options(), events.append)
        kept = json.loads((output / "run.json").read_text())["plan"]
        assert (kept["checkpointing"], kept["lowest"]) == (mode != "none", 1 if mode == 1 else None)
        weights.append(load_file(output / "adapter" / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        for other in weights[1:]:
            assert (other[name] - tensor).abs().max() < 1e-5, name
