"""What a plain step on float32 weights really keeps under autocast, against the formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from allocations import saved
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from peftcli.architecture.config import architecture_from, linear_shapes
from peftcli.estimate.facts import step_of
from peftcli.estimate.memory import training_peak
from peftcli.estimate.plan import Plan
from peftcli.train import attention
from peftcli.train.batches import Batches, model_inputs

HIDDEN, RANK = 128, 4
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def kept_bytes(model: Any, body: Any, length: int) -> int:
    """Bytes that the layers keep for the backward pass of two rows, parameters left out."""
    rows = [{"input_ids": [5] * length, "labels": [5] * length}] * 2
    (batch,) = Batches(0, 2, length, apart=True)(rows)["micro_batches"]
    inputs = model_inputs(batch)
    inputs.pop("labels")
    with saved(model.parameters()) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
        body(**inputs, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def activations(plan: Plan) -> float:
    parts = training_peak(plan).parts
    return sum(part.size for part in parts if part.name == "activations")


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bytes_for_each_token(family: str, method: str) -> None:
    attention.register()
    torch.manual_seed(0)
    config = CONFIGS[family](**SIZES)
    model: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.NAME, dtype=torch.float32
    )
    body, full = model.model.train(), method == "full"
    architecture = architecture_from(config.to_dict())
    targets = () if full else tuple(linear_shapes(architecture, "all-linear"))
    if not full:
        chosen = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear")
        model = get_peft_model(model, chosen).train()
    plan = Plan(
        architecture=architecture,
        trainable=architecture.parameters() if full else 1,
        targets=targets,
        rank=RANK,
        trains_base=full,
        base_bytes=4,
        batch=2,
        micro_batch=2,
    )
    plan = replace(plan, step=step_of(plan))
    found = [activations(replace(plan, length=tokens)) for tokens in (64, 192)]
    grown = kept_bytes(model, body, 192) - kept_bytes(model, body, 64)
    # The last norm keeps its input, and its output before the weight where that is trained; a
    # trained embedding keeps its token ids. Above a frozen one the first norm keeps nothing.
    ends = 2 * 4 * HIDDEN + 4 + 8 if full else 0
    assert grown / 256 == (found[1] - found[0]) / 256 + ends
