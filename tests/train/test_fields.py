"""Every field of the recipe reaches something: set apart from its default, a result changes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from peftcli.architecture.config import architecture_from
from peftcli.dataset import prepare
from peftcli.methods import METHODS
from peftcli.models import Device, load_tokenizer
from peftcli.recipe.checks import packs
from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.recipe.schema import SECTIONS, Recipe
from peftcli.run_dir import RunDir
from peftcli.train.config import sft_config
from peftcli.train.plan import cpu_load, decide

CPU = Device("cpu", "float32", "CPU", None)

LLAMA = architecture_from(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 288,
    }
)

METHOD_VALUES: dict[str, Any] = {
    "rank": 8,
    "alpha": 64,
    "dropout": 0.25,
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
    "layers": [0],
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4.0},
    "use_rslora": True,
    "use_dora": True,
    "bias": "all",
    "init": "gaussian",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [3],
    "quantization": "fp4",
    "double_quantization": False,
    "compute_dtype": "float16",
    "placement": "pfeiffer",
    "bottleneck_size": 16,
    "reduction_factor": 4.0,
    "non_linearity": "gelu",
    "scaling": 2.0,
    "loraplus_lr_ratio": 16.0,
}


def built(method: dict[str, Any]) -> str:
    """Everything that PEFT, bitsandbytes, the fused layers and the optimizer are told by it."""
    recipe = {"model": "m", "method": method, "data": {"train": "x"}, "output": "o"}
    chosen = validate(Document("t", recipe)).recipe.method
    config = chosen.peft_config(LLAMA)
    quantization = chosen.quantization_config("bfloat16")
    parts = [
        config.to_dict() if config else None,
        quantization.to_dict() if quantization else None,
        chosen.learning_rate_multipliers(),
        chosen.frozen_in_fp8,
    ]
    return json.dumps(parts, default=lambda value: sorted(map(str, value)), sort_keys=True)


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name, model in METHODS.items() for field in model.model_fields],
)
def test_every_method_field_changes_what_peft_receives(name: str, field: str) -> None:
    if field == "name":
        return
    value = not METHODS[name].model_fields[field].default if field == "bias" else None
    changed = METHOD_VALUES[field] if not isinstance(value, bool) or name != "adapter" else value
    base: dict[str, Any] = {"name": name}
    if name == "adapter" and field in ("double_quantization", "compute_dtype"):
        base["quantization"] = "nf4"
    if (name, field) == ("lora", "quantization"):
        changed = "fp8"
    assert built({**base, field: changed}) != built(base)


TRAINING_VALUES: dict[str, Any] = {
    "learning_rate": 1e-3,
    "epochs": 7.0,
    "max_steps": 11,
    "batch_size": 4,
    "micro_batch_size": 2,
    "optimizer": "adafactor",
    "schedule": "linear",
    "warmup": 5,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "neftune_noise_alpha": 5.0,
    "checkpointing": "full",
    "packing": True,
    "save_steps": 3,
    "report_to": ["tensorboard"],
}
# Read elsewhere; the named test holds each of them.
TRAINING_ELSEWHERE = {
    "device": "tests/train/test_run.py::test_a_gpu_recipe_without_a_gpu",
    "kernels": "tests/train/test_run.py::test_fused_and_plain_steps_learn_the_same",
    "memory_limit_gib": "tests/train/test_gpu.py::test_a_run_keeps_to_its_memory_limit",
    "keep_checkpoints": "tests/train/test_checkpoints.py::test_rotation_keeps_best_and_newest",
    "max_nonfinite_steps": "tests/train/test_run.py::test_numbers_that_blow_up_stop_the_run",
    "on_nonfinite": "tests/faults/test_numbers.py::test_a_poisoned_row",
    "on_oom": "tests/faults/test_memory.py::test_shrinking_goes_on_from_the_last_step",
}
EVALUATION_VALUES: dict[str, Any] = {"steps": 3, "batch_size": 3, "keep_best": False}
EVALUATION_ELSEWHERE = {
    "early_stopping": "tests/train/test_run.py::test_early_stopping",
    "early_stopping_threshold": "tests/train/test_run.py::test_early_stopping_threshold",
    **dict.fromkeys(
        ("metrics", "retain", "max_new_tokens"),
        "tests/evaluate/test_check.py::test_the_recipe_completes_the_command_line",
    ),
    "gates": "tests/evaluate/test_run.py::test_gates_of_the_recipe_are_judged",
}


def told(folder: Path, **sections: Any) -> str:
    """Everything that TRL and the plan are told by the rest of the recipe."""
    values: dict[str, Any] = {"model": "m", "method": "lora", "data": {"train": "x"}}
    recipe = validate(Document("t", {**values, "output": "o", **sections})).recipe
    load = cpu_load(recipe, longest=50)
    plan = decide(recipe, rows=100, has_eval=True, packing=packs(recipe, LLAMA), load=load)
    config = sft_config(recipe, plan, CPU, RunDir(folder)).to_dict()
    return json.dumps([config, asdict(plan)], default=str, sort_keys=True)


@pytest.mark.parametrize(("field", "value"), TRAINING_VALUES.items())
def test_every_training_field_changes_what_trl_receives(
    tmp_path: Path, field: str, value: Any
) -> None:
    assert told(tmp_path, training={field: value}) != told(tmp_path)


@pytest.mark.parametrize(("field", "value"), EVALUATION_VALUES.items())
def test_every_evaluation_field_changes_what_trl_receives(
    tmp_path: Path, field: str, value: Any
) -> None:
    assert told(tmp_path, evaluation={field: value}) != told(tmp_path)


def test_the_seed_reaches_trl(tmp_path: Path) -> None:
    assert told(tmp_path, seed=7) != told(tmp_path)


def test_no_field_is_forgotten() -> None:
    for section, values, elsewhere in [
        ("training", TRAINING_VALUES, TRAINING_ELSEWHERE),
        ("evaluation", EVALUATION_VALUES, EVALUATION_ELSEWHERE),
        ("data", DATA_VALUES, {}),
        ("train", SOURCE_VALUES, SOURCE_ELSEWHERE),
    ]:
        model: type[BaseModel] = SECTIONS[section]
        assert set(values) | set(elsewhere) == set(model.model_fields), section
    assert {field for model in METHODS.values() for field in model.model_fields} == {
        "name",
        *METHOD_VALUES,
    }
    root = Path(__file__).parent.parent.parent
    for place in [*TRAINING_ELSEWHERE.values(), *EVALUATION_ELSEWHERE.values()]:
        file, _, name = place.partition("::")
        assert f"def {name}(" in (root / file).read_text(encoding="utf-8")
    sections = {"model", "method", "data", "training", "evaluation"}
    assert set(Recipe.model_fields) == sections | {"output", "seed"}


CHAT = [
    {"role": "user", "content": "question {i}"},
    {"role": "assistant", "content": "answer {i}"},
    {"role": "user", "content": "again {i}"},
    {"role": "assistant", "content": "second {i}"},
]
DATA_VALUES: dict[str, Any] = {
    "train": "{folder}/other.jsonl",
    "eval": "{folder}/other.jsonl",
    "format": "text",
    "columns": {"text": "note"},
    "labels": ["no", "yes"],
    "system": "Be brief.",
    "train_on": "all",
    "chat_template": "chatml",
    "max_length": 40,
    "too_long": "drop",
    "bad_rows": "skip",
    "duplicates": "drop",
    "overlap": "allow",
    "limit": 5,
}
SOURCE_VALUES: dict[str, Any] = {
    "path": "{folder}/other.jsonl",
    "weight": 2.0,
    "limit": 5,
    "format": "text",
    "columns": {"text": "note"},
    "labels": ["no", "yes"],
}
# Only a hub set, or a folder with several splits, has them: tests/data/test_sources.py.
SOURCE_ELSEWHERE = {"split": "", "subset": "", "revision": ""}
# What must be so for a field to matter.
GROUND: dict[str, dict[str, Any]] = {
    "columns": {"format": "text"},
    "too_long": {"max_length": 40},
    "labels": {"train": "{folder}/labels.csv"},
    "bad_rows": {"train": "{folder}/bad.jsonl"},
    "overlap": {"eval": "{folder}/rows.jsonl"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    for i in [*range(20), 3]:
        text = json.dumps({"messages": CHAT, "note": f"note {i}", "text": f"text {i}"})
        lines.append(text.replace("{i}", str(i)))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "other.jsonl").write_text(
        "\n".join(line.replace("answer", "reply") for line in lines[:9]) + "\n"
    )
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    table = ["text,label", *(f"sentence {i},{i % 2}" for i in range(20))]
    (tmp_path / "labels.csv").write_text("\n".join(table) + "\n")
    return tmp_path


def prepared(folder: Path, base_model: Path, data: dict[str, Any]) -> str:
    """The rows that training sees, or the refusal."""
    text = json.dumps({"train": "{folder}/rows.jsonl", **data}).replace("{folder}", str(folder))
    values = {"model": "m", "method": "lora", "data": json.loads(text), "output": "o"}
    recipe = validate(Document("t", values)).recipe
    tokenizer = load_tokenizer(recipe.model.model_copy(update={"name": str(base_model)}))
    try:
        found = prepare(
            recipe.data, tokenizer, base_dir=folder, cache_dir=folder / "cache", seed=1, workers=1
        )
    except Exception as error:  # a refusal is a result too
        return f"{type(error).__name__}: {error}"
    held = found.eval.to_dict() if found.eval is not None else None
    return json.dumps([found.train.to_dict(), held])


@pytest.mark.parametrize(("field", "value"), DATA_VALUES.items())
def test_every_data_field_changes_the_rows(
    folder: Path, base_model: Path, field: str, value: Any
) -> None:
    ground = GROUND.get(field, {})
    assert prepared(folder, base_model, {**ground, field: value}) != prepared(
        folder, base_model, ground
    )


@pytest.mark.parametrize(("field", "value"), SOURCE_VALUES.items())
def test_every_source_field_changes_the_rows(
    folder: Path, base_model: Path, field: str, value: Any
) -> None:
    source: dict[str, Any] = {"path": "{folder}/rows.jsonl"}
    if field == "labels":
        source["path"] = "{folder}/labels.csv"
    if field == "columns":
        source["format"] = "text"
    assert prepared(folder, base_model, {"train": {**source, field: value}}) != prepared(
        folder, base_model, {"train": source}
    )


def test_trackers_write_into_the_run_folder(tmp_path: Path) -> None:
    told(tmp_path, training={"report_to": ["tensorboard"]})
    assert "tracking" in os.environ["TENSORBOARD_LOGGING_DIR"]
