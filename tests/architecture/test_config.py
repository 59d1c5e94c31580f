"""Architectures read from config.json equal the models that transformers builds from it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from peftcli.architecture.config import (
    Architecture,
    architecture_from,
    linear_shapes,
    read_architecture,
)
from peftcli.architecture.layouts import LAYOUTS

CONFIGS = Path(__file__).parents[2].parent / "shared" / "configs"
NOT_IN_TRANSFORMERS = {"internlm2"}
TYPES = sorted(({"gemma3"} | set(LAYOUTS)) - NOT_IN_TRANSFORMERS)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", {"multi_query": False, "parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", {"enable_bias": False}),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}),
    ("gpt_bigcode", {"multi_query": False}),
    ("phi", {"qk_layernorm": True}),
    ("cohere", {"use_qk_norm": True}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
    ("deepseek_v3", {"q_lora_rank": None, "n_shared_experts": 2, "attention_bias": True}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("gpt_oss", {"attention_bias": False}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("gemma3_text", {"tie_word_embeddings": False}),
    ("nemotron_h", {"hybrid_override_pattern": "ME*-ME", "use_bias": True, "mlp_bias": True}),
    ("nemotron_h", {"hybrid_override_pattern": "E*", "moe_latent_size": 16}),
    ("llama4_text", {"interleave_moe_layer_step": 2}),
]
EXTRA = {
    "nemotron_h": {
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "chunk_size": 8,
    },
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96},
}


def real_config(name: str) -> Path:
    folder = CONFIGS / name
    if not folder.is_dir():
        pytest.skip("needs the real configurations beside the repository")
    return folder


def config_of(model_type: str, changes: dict[str, Any]) -> Any:
    if model_type not in EXTRA:
        base = tiny_config(model_type).to_dict() | changes
        if model_type == "gemma3":
            base["vision_config"]["vision_use_head"] = False
        return AutoConfig.for_model(**base)
    common = tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    values = {name: common[name] for name in (*names, "num_attention_heads")}
    values |= {"num_key_value_heads": 2, **EXTRA[model_type], **changes}
    return AutoConfig.for_model(model_type, **values)


def on_meta(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linears_of(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found[name] = (*module.weight.shape, module.bias is not None)
        elif isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features, module.bias is not None)
    return found


def ours(architecture: Architecture) -> dict[str, tuple[int, int, bool]]:
    return {
        path: (linear.inputs, linear.outputs, linear.bias)
        for linear in architecture.linears
        for path, _ in linear.paths()
    }


def saved(config: Any, folder: Path) -> Architecture:
    config.save_pretrained(folder)
    return read_architecture(folder)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [(name, {}) for name in TYPES] + VARIANTS,
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_equals_the_model_of_transformers(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(model_type, changes)
    model = on_meta(config)
    architecture = saved(config, tmp_path)

    assert architecture_from(config.to_dict()) == architecture
    assert ours(architecture) == linears_of(model)
    assert architecture.parameters() == sum(p.numel() for p in model.parameters())
    assert architecture.exact
    text = config.get_text_config()
    assert architecture.tied_embeddings == text.tie_word_embeddings
    assert architecture.layers == text.num_hidden_layers

    kept = get_keys_to_not_convert(model)
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    quantized = replace_with_bnb_linear(model, kept, quantization).named_modules()
    assert {name for name, module in quantized if type(module).__name__ == "Linear4bit"} == {
        path for x in architecture.linears if x.quantizable for path, _ in x.paths()
    }


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*/")) or ["llama-2-7b"])
def test_real_configurations(name: str) -> None:
    expected = json.loads((real_config(name).parent / "EXPECTED.json").read_text())[name]
    architecture = read_architecture(real_config(name))
    if expected["error"]:
        # internlm2-7b runs remote code; the figure is the one of its model card's checkpoint.
        assert architecture.parameters() == 7_737_708_544
        return
    counts: Counter[str] = Counter()
    for linear in architecture.linears:
        counts[linear.suffix] += linear.count
    targets = linear_shapes(architecture, "all-linear")
    assert architecture.parameters() == expected["parameters"]
    assert dict(counts) == expected["linear_modules"]
    assert (
        sum(8 * (x.inputs + x.outputs) * x.count for x in targets)
        == (expected["lora_r8_all_linear_trainable"])
    )


@pytest.mark.parametrize(
    ("name", "method", "bits"),
    [("qwen3-32b-fp8", "fp8", 8), ("gpt-oss-20b", "mxfp4", 4), ("deepseek-v3", "fp8", 8)],
)
def test_quantised_checkpoints_are_recognised(name: str, method: str, bits: int) -> None:
    quantization = read_architecture(real_config(name)).quantization
    assert quantization is not None
    assert (quantization.method, quantization.bits) == (method, bits)


def test_facts_beside_the_modules() -> None:
    mistral = read_architecture(real_config("mistral-7b-v0.1"))
    assert (mistral.sliding_window, mistral.dtype, mistral.kv_heads) == (4096, "bfloat16", 8)
    assert read_architecture(real_config("qwen2.5-7b")).sliding_window is None
    assert read_architecture(real_config("gemma-2-9b")).attention_softcap
    assert not read_architecture(real_config("gemma-3-27b")).attention_softcap
    mixtral = read_architecture(real_config("mixtral-8x7b"))
    assert mixtral.active_parameters() == 12_879_925_248
