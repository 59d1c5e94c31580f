"""From a recipe to an estimate, as data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import ArtefactError, UsageError
from peftcli.estimate.find import find_architecture
from peftcli.estimate.gpus import find_gpu
from peftcli.estimate.result import Estimate, Rows
from peftcli.estimate.run import run
from peftcli.recipe.schema import Recipe


def recipe(model: str = "llama-3.1-8b", method: Any = "qlora", **changes: Any) -> Recipe:
    data = {"train": "rows.jsonl", **changes.pop("data", {})}
    values = {"model": model, "method": method, "data": data, "output": "out", **changes}
    return Recipe.model_validate(values)


def estimate(gpu: str = "24GB", rows: Rows | None = None, **changes: Any) -> Estimate:
    return run(recipe(**changes), find_gpu(gpu), rows=rows)


def test_qlora_of_an_8b_on_24_gib() -> None:
    found = estimate(gpu="4090", rows=Rows(count=10_000, longest=2048, mean=400))
    assert found.verdict == "fits"
    assert found.parameters == 8_030_261_248
    assert found.trainable == 41_943_040
    memory = found.memory
    assert memory.low_gib < memory.likely_gib < memory.high_gib < memory.needed_gib
    assert memory.needed_gib <= memory.available_gib
    assert sum(part.gib for part in memory.parts) == pytest.approx(memory.likely_gib)
    assert found.time is not None
    assert found.time.steps == 3 * 625
    assert found.time.low_cost_usd is not None
    assert found.changes == ()


def test_an_estimate_is_json() -> None:
    text = json.dumps(asdict(estimate()))
    assert json.loads(text)["memory"]["parts"][0]["formula"]


def test_what_the_recipe_fixes_is_kept() -> None:
    fixed = {"micro_batch_size": 2, "batch_size": 8, "checkpointing": "full"}
    found = estimate(training=fixed).settings
    assert (found.micro_batch_size, found.accumulation, found.checkpointing) == (2, 4, "full")


def test_too_small_a_card_gets_advice_and_other_cards() -> None:
    found = estimate(gpu="16GB", method="lora")
    assert found.verdict == "fits with changes"
    assert not found.holds
    assert found.changes[0].line == "method.name: qlora"
    assert found.changes[0].fits
    assert found.paste == "method:\n  name: qlora"
    assert found.other_gpus[0].name == "RTX 3090"


@pytest.mark.parametrize("method", ["lora", "qlora", "adapter", "full"])
@pytest.mark.parametrize("model", ["qwen3-0.6b", "gpt2", "gemma-3-4b"])
def test_every_method_has_an_estimate(model: str, method: str) -> None:
    found = estimate(gpu="h200", model=model, method=method)
    assert found.verdict == "fits"
    assert found.memory.likely_gib > 0.2


def test_a_four_bit_adapter_needs_less_than_a_16_bit_one() -> None:
    plain = estimate(gpu="h100", method="adapter", training={"checkpointing": "full"})
    four = estimate(
        gpu="h100",
        method={"name": "adapter", "quantization": "nf4"},
        training={"checkpointing": "full"},
    )
    assert four.memory.likely_gib < plain.memory.likely_gib - 8


def test_longer_rows_than_the_model_has_positions_are_cut() -> None:
    found = estimate(model="gpt2", method="lora", data={"max_length": 4096})
    assert found.settings.tokens_per_row == 1024


def test_short_rows_are_not_estimated_as_long_ones() -> None:
    long = estimate(training={"checkpointing": "full", "micro_batch_size": 1})
    short = estimate(
        rows=Rows(count=100, longest=128, mean=60),
        training={"checkpointing": "full", "micro_batch_size": 1},
    )
    assert short.memory.likely_gib < long.memory.likely_gib
    assert not any("rows were not read" in note for note in short.notes)


def test_packed_rows_make_fewer_steps() -> None:
    rows = Rows(count=10_000, longest=2048, mean=200)
    padded = estimate(gpu="h100", rows=rows).time
    packed = estimate(gpu="h100", rows=rows, training={"packing": True}).time
    assert padded is not None
    assert packed is not None
    assert packed.steps < padded.steps / 5
    assert packed.tokens_per_second > padded.tokens_per_second


def test_notes_tell_what_is_uncertain() -> None:
    mixtral = estimate(model="mixtral-8x7b", gpu="h200").notes
    assert any("experts stay in 16 bits" in note for note in mixtral)
    assert any("never checked" in note for note in mixtral)
    oss = estimate(model="gpt-oss-20b", gpu="h200", method="lora").notes
    assert any("mxfp4" in note for note in oss)
    dora = estimate(method={"name": "lora", "use_dora": True}, gpu="h200").notes
    assert any("DoRA" in note for note in dora)


def test_softcap_and_windows_choose_the_kernel() -> None:
    assert estimate(model="gemma-2-9b").settings.attention == "eager"
    long = estimate(model="mistral-7b-v0.1", data={"max_length": 8192})
    assert long.settings.attention == "masked"
    one = {"micro_batch_size": 1}
    assert estimate(model="mistral-7b-v0.1", training=one).settings.attention == "flash"


def test_models_are_found_by_folder_file_cache_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_folder = find_architecture(str(tmp_path))
    assert find_architecture(str(tmp_path / "config.json")) == by_folder
    snapshot = tmp_path / "hub" / "models--me--mine" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(tmp_path / "config.json", snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_architecture("me/mine") == by_folder
    assert find_architecture("Qwen/Qwen3-8B").parameters() == 8_190_735_360
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtefactError, match="config"):
        find_architecture(str(tmp_path))


def test_an_unknown_model_gets_near_names() -> None:
    with pytest.raises(UsageError) as caught:
        find_architecture("Qwen/Qwen3-8")
    assert "qwen3-8b" in caught.value.hint


def test_an_estimate_starts_in_a_blink_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from peftcli.estimate.run import run;"
        "from peftcli.estimate.gpus import find_gpu; from peftcli.recipe.schema import Recipe;"
        "run(Recipe.model_validate({'model': 'qwen3-8b', 'method': 'qlora', 'output': 'o',"
        "'data': {'train': 'x.jsonl'}}), find_gpu('4090'));"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'datasets'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0  # 0.3 s on an idle machine
