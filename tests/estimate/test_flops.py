"""FLOPs of the formula against those that PyTorch counts in a forward and backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from peftcli.adapters import wrap
from peftcli.architecture.config import architecture_from
from peftcli.estimate.facts import plan_of
from peftcli.estimate.flops import flops_per_token
from peftcli.estimate.gpus import find_gpu
from peftcli.recipe.schema import Recipe

TOKENS = 64
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
RECIPES: list[dict[str, Any]] = [
    {"name": "full"},
    {"name": "lora", "rank": 8},
    {"name": "lora", "rank": 4, "rank_pattern": {"q_proj": 64, "down_proj": 32}},
    {"name": "lora", "rank": 8, "modules_to_save": ["lm_head"]},
    {"name": "lora", "rank": 8, "modules_to_save": ["embed_tokens"]},
    {"name": "lora", "rank": 8, "trainable_token_indices": [3]},
    {"name": "lora", "rank": 8, "layers": [4]},
    {"name": "lora", "rank": 8, "layers": [0, 5]},
    {"name": "lora", "rank": 8, "layers": [4], "modules_to_save": ["embed_tokens"]},
    {"name": "adapter", "bottleneck_size": 16},
    {"name": "adapter", "bottleneck_size": 16, "layers": [3]},
]


def counted(recipe: Recipe) -> float:
    """FLOPs of all matrix products for each token, those of attention left out."""
    base = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa")
    config = recipe.method.peft_config(architecture_from(CONFIG.to_dict()))
    model = base if config is None else wrap(base, config)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids).logits.sum().backward()
    kinds = counter.get_flop_counts()["Global"]
    return sum(n for kind, n in kinds.items() if "attention" not in str(kind)) / TOKENS


@pytest.mark.parametrize("method", RECIPES, ids=lambda method: " ".join(map(str, method.values())))
def test_products(method: dict[str, Any]) -> None:
    keys = {"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    recipe = Recipe.model_validate({**keys, "method": method})
    architecture = architecture_from(CONFIG.to_dict())
    plan = plan_of(recipe, architecture, find_gpu("H100"), length=TOKENS, packing=False)
    products, _ = flops_per_token(replace(plan, loss="logits"), TOKENS)
    # The first layer that is tuned sends no gradient to what lies before it.
    assert products == pytest.approx(counted(recipe), rel=0.025)
