"""What the fused step really keeps, against the formula; and when the estimate counts on it."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config

from peftcli.adapters import wrap
from peftcli.architecture.config import architecture_from, linear_shapes
from peftcli.estimate.facts import fused_step_of, plan_of
from peftcli.estimate.gpus import find_gpu
from peftcli.estimate.groups import factors_and_room
from peftcli.estimate.memory import training_peak
from peftcli.estimate.plan import Plan
from peftcli.estimate.run import run
from peftcli.methods.bottleneck_tuner import BottleneckConfig
from peftcli.recipe.schema import Recipe
from peftcli.train import attention
from peftcli.train.batches import Batches
from peftcli.train.fast.lora import Unsupported
from peftcli.train.fast.model import accelerate

RANK, WIDTH = 8, 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # as many as queries: repeated keys are no part of the fused step
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
CONFIGS = {"llama": LlamaConfig, "phi3": Phi3Config, "qwen3": Qwen3Config}


def model_of(family: str, method: str = "lora", **options: Any) -> Any:
    """A bfloat16 model with a float32 adapter on all linears."""
    attention.register()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        CONFIGS[family](**SIZES), attn_implementation=attention.NAME, dtype=torch.bfloat16
    )
    linears: Any = LINEARS if "layers_to_transform" in options else "all-linear"
    config: Any = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=linears, **options)
    if method == "adapter":
        modules = ["o_proj", "down_proj"]
        config = BottleneckConfig(
            task_type="CAUSAL_LM", target_modules=modules, bottleneck_size=WIDTH, **options
        )
    return get_peft_model(base, config).train()


def plan_for(family: str, method: str, tokens: int, checkpointing: bool) -> Plan:
    architecture = architecture_from(CONFIGS[family](**SIZES).to_dict())
    targets = () if method == "adapter" else tuple(linear_shapes(architecture, "all-linear"))
    each = 2 * SIZES["hidden_size"] * WIDTH + WIDTH + SIZES["hidden_size"]
    plan = Plan(
        architecture=architecture,
        trainable=sum(x.count * RANK * (x.inputs + x.outputs) for x in targets) or 6 * each,
        targets=targets,
        rank=RANK if targets else 0,
        bottleneck=0 if targets else WIDTH,
        sites=0 if targets else 2,
        batch=2,
        micro_batch=2,
        length=tokens,
        checkpointing=checkpointing,
        quantization="fp8" if method == "fp8" else None,
    )
    return replace(plan, step=fused_step_of(plan))


def kept_bytes(model: Any, fast: Any, length: int) -> int:
    """Bytes that the layers keep for the backward pass of two rows, parameters left out."""
    own = {x.untyped_storage().data_ptr() for x in model.parameters()}
    own |= {x.untyped_storage().data_ptr() for x in fast.shadows.copies}
    kept: list[tuple[weakref.ref[torch.Tensor], int, int]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held = tensor.detach()  # lives as long as the graph needs it
        storage = tensor.untyped_storage()
        kept.append((weakref.ref(held), storage.data_ptr(), storage.nbytes()))
        return held

    rows = [{"input_ids": [5] * length, "labels": [5] * length}] * 2
    (batch,) = Batches(0, 2, length, apart=True)(rows)["micro_batches"]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = fast.body(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seq_lens_q=batch.get("cu_seq_lens"),
            max_length_q=batch["longest"],
            use_cache=False,
        )
    alive = {place: size for held, place, size in kept if held() is not None and place not in own}
    assert output is not None  # and with it the graph
    return sum(alive.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["lora", "fp8", "adapter"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bytes_for_each_token(family: str, method: str, checkpointing: bool) -> None:
    model = model_of(family, method)
    fast = accelerate(model, checkpointing, fp8=method == "fp8")
    grown = kept_bytes(model, fast, 192) - kept_bytes(model, fast, 64)
    plans = [plan_for(family, method, tokens, checkpointing) for tokens in (64, 192)]
    found = [_activations(plan) for plan in plans]
    expected = (found[1] - found[0]) / 256 + 2 * SIZES["hidden_size"] + 4  # the last norm's input
    if checkpointing:  # the function that computes again holds the rotation, autograd does not
        expected -= 4 * SIZES["head_dim"]
    assert grown / 256 == expected


@pytest.mark.parametrize("lowest", [1, 2])
@pytest.mark.parametrize("method", ["lora", "fp8", "adapter"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bytes_where_some_layers_are_checkpointed(family: str, method: str, lowest: int) -> None:
    model = model_of(family, method)
    fast = accelerate(model, True, lowest=lowest, fp8=method == "fp8")
    grown = kept_bytes(model, fast, 192) - kept_bytes(model, fast, 64)
    plans = [plan_for(family, method, tokens, True).checkpointed(lowest) for tokens in (64, 192)]
    found = [_activations(plan) for plan in plans]
    assert grown / 256 == (found[1] - found[0]) / 256 + 2 * SIZES["hidden_size"] + 4


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("layers", [[1], [0], [0, 2]], ids=str)
def test_layers_below_the_lowest_adapter_keep_nothing(
    layers: list[int], method: str, checkpointing: bool
) -> None:
    model = model_of("llama", method, layers_to_transform=layers)
    fast = accelerate(model, checkpointing)
    grown = kept_bytes(model, fast, 192) - kept_bytes(model, fast, 64)
    plans = [plan_for("llama", method, tokens, checkpointing) for tokens in (64, 192)]
    if method == "lora":
        targets = tuple(linear_shapes(plans[0].architecture, LINEARS, layers))
        plans = [replace(plan, targets=targets) for plan in plans]
    plans = [replace(plan, layers=tuple(layers)) for plan in plans]
    found = [_activations(plan) for plan in plans]
    expected = (found[1] - found[0]) / 256 + 2 * SIZES["hidden_size"] + 4
    if checkpointing:
        expected -= 4 * SIZES["head_dim"]
    assert grown / 256 == expected


def _activations(plan: Plan) -> float:
    parts = training_peak(plan).parts
    return sum(part.size for part in parts if part.name == "activations")


RECIPES: list[dict[str, Any]] = [
    {"name": "lora"},
    {"name": "lora", "dropout": 0.1},
    {"name": "lora", "use_dora": True},
    {"name": "lora", "target_modules": ["q_proj", "down_proj"], "layers": [1]},
    {"name": "lora", "modules_to_save": ["lm_head"]},
    {"name": "lora", "modules_to_save": ["embed_tokens"]},
    {"name": "lora", "trainable_token_indices": [3]},
    {"name": "lora", "use_rslora": True, "rank_pattern": {"q_proj": 4}},
    {"name": "adapter"},
    {"name": "adapter", "placement": "pfeiffer"},
    {"name": "adapter", "placement": "parallel"},
    {"name": "adapter", "dropout": 0.1},
    {"name": "adapter", "modules_to_save": ["lm_head"]},
    {"name": "full"},
]


@pytest.mark.parametrize("method", RECIPES, ids=lambda method: " ".join(map(str, method.values())))
def test_the_estimate_counts_on_the_step_that_train_takes(method: dict[str, Any]) -> None:
    keys = {"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    recipe = Recipe.model_validate({**keys, "method": method})
    config = CONFIGS["llama"](**SIZES)
    architecture = architecture_from(config.to_dict())
    plan = plan_of(recipe, architecture, find_gpu("H100"), length=64, packing=False)
    attention.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    wrapped = recipe.method.peft_config(architecture)
    try:
        accelerate(model if wrapped is None else wrap(model, wrapped))
        fused = True
    except Unsupported:
        fused = False
    assert plan.step.name.startswith("fused") == fused


# scripts/benchmark_train on an H100 80GB, torch 2.11, 2026-11-25: 4 x 2048 full rows of
# Llama-3.1-8B shapes; peak GiB and seconds of a step.
BENCHMARK = [
    ({"name": "lora"}, False, 39.254, 0.482),
    ({"name": "lora", "quantization": "fp8"}, False, 32.819, 0.356),
    ({"name": "qlora"}, False, 29.433, 0.506),
    ({"name": "lora"}, True, 18.542, 0.635),
]


@pytest.mark.parametrize(("method", "checkpointing", "gib", "seconds"), BENCHMARK, ids=str)
def test_equals_whole_runs_of_the_benchmark(
    method: dict[str, Any], checkpointing: bool, gib: float, seconds: float
) -> None:
    mode = "full" if checkpointing else "none"
    training = {"batch_size": 4, "micro_batch_size": 4, "checkpointing": mode}
    keys = {"model": "llama-3.1-8b", "data": {"train": "rows.jsonl"}, "output": "run"}
    recipe = Recipe.model_validate({**keys, "method": method, "training": training})
    found = run(recipe, find_gpu("H100"))
    assert found.memory.likely_gib == pytest.approx(gib, rel=0.01)
    assert found.time is not None
    assert found.time.step_seconds == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"kernels": "plain"}},
        {"training": {"neftune_noise_alpha": 5.0}},
        {"model": {"name": "x", "attention": "eager"}},
        {"model": {"name": "x", "dtype": "float16"}},
    ],
)
def test_what_turns_the_fused_step_off(changes: dict[str, Any]) -> None:
    keys = {"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    recipe = Recipe.model_validate({**keys, "method": {"name": "lora"}, **changes})
    architecture = architecture_from(CONFIGS["llama"](**SIZES).to_dict())
    plan = plan_of(recipe, architecture, find_gpu("H100"), length=64, packing=False)
    assert plan.step.name.startswith("TRL")


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_factors_lie_in_the_matrices_of_the_weights(method: str) -> None:
    model = model_of("llama", method)
    before = _held(list(model.parameters()))
    fast = accelerate(model)
    after = _held([*model.parameters(), *(x for x in fast.shadows.copies if x is not None)])
    (part,) = factors_and_room(plan_for("llama", method, 64, False))
    assert part.size == after - before


def test_each_target_counts_with_its_own_rank() -> None:
    pattern = {"q_proj": 40, "down_proj": 24}
    model = model_of("llama", rank_pattern=pattern)
    before = _held(list(model.parameters()))
    fast = accelerate(model)
    after = _held([*model.parameters(), *(x for x in fast.shadows.copies if x is not None)])
    keys = {"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    method = {"name": "lora", "rank": RANK, "rank_pattern": pattern}
    recipe = Recipe.model_validate({**keys, "method": method})
    architecture = architecture_from(CONFIGS["llama"](**SIZES).to_dict())
    plan = plan_of(recipe, architecture, find_gpu("H100"), length=64, packing=False)
    (part,) = factors_and_room(plan)
    assert part.size == after - before
    grown = kept_bytes(model, fast, 192) - kept_bytes(model, fast, 64)
    sizes = [_activations(replace(plan, length=tokens)) for tokens in (64, 192)]
    assert grown / 256 == (sizes[1] - sizes[0]) / 128 + 2 * SIZES["hidden_size"] + 4


def _held(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages; several views of one count once."""
    return sum(
        {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()
    )


def test_ranks_of_a_pattern_are_not_forgotten() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    pattern = {"name": "lora", "rank": 8, "rank_pattern": dict.fromkeys(names, 64)}
    keys = {"model": "llama-3.1-8b", "data": {"train": "rows.jsonl"}, "output": "run"}
    found = [
        run(Recipe.model_validate({**keys, "method": method}), find_gpu("H100")).memory
        for method in (pattern, {"name": "lora", "rank": 64})
    ]
    assert found[0].likely_gib == found[1].likely_gib
