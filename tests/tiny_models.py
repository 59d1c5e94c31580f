"""Random models of every supported family, small enough to build in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from peftcli.methods.bottleneck_tuner import BottleneckConfig

VOCABULARY = 128
HIDDEN = 64  # one block of the 4-bit format
INTERMEDIATE = 128
LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {**_LATENT_ATTENTION, **_ROUTED_EXPERTS, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT_ATTENTION, **_ROUTED_EXPERTS},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "glm4_moe": _ROUTED_EXPERTS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": LAYERS},
    "gpt_oss": _LOCAL_EXPERTS,
    "gptj": {"rotary_dim": 8},
    "granitemoe": _LOCAL_EXPERTS,
    "minimax_m2": {**_LOCAL_EXPERTS, "rotary_dim": 8},
    "mixtral": _LOCAL_EXPERTS,
    "mpt": {"d_model": HIDDEN, "n_heads": 4, "n_layers": LAYERS, "expansion_ratio": 2},
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN},
    "phimoe": _LOCAL_EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _EXPERTS,
}
_JOINED = {  # families that have one linear where Llama has several
    "phi3": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    }
}
_NO_HEAD_DIM = {"falcon"}  # a read-only property there


def tiny_config(model_type: str, **own: Any) -> PretrainedConfig:
    """Return a configuration of two layers of 64 features and a vocabulary of 128 tokens.

    Keys of `own` take the place of these, except in a model with vision.
    """
    if model_type == "gemma3":
        return _with_vision(model_type)
    values = {**_COMMON, **_OWN.get(model_type, {}), **own}
    if model_type in _NO_HEAD_DIM:
        del values["head_dim"]
    return AutoConfig.for_model(model_type, **values)


def linears_of(model_type: str, names: list[str]) -> list[str]:
    """What a family calls the linears that have these names in Llama."""
    joined = _JOINED.get(model_type, {})
    return sorted({joined.get(name, name) for name in names})


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Return a random model in evaluation mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=dtype).eval()


def tiny_nf4_model(folder: Path) -> PreTrainedModel:
    """Load a saved model in NF4 with double quantisation, computing in float32 on the CPU.

    bitsandbytes repacks the weights at the first evaluation on a CPU with AVX512-BF16, and training
    after that goes through a kernel without gradients; so its fast path is switched off.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def llama_2_7b_without_weights() -> PreTrainedModel:
    """Return Llama 2 7B in bfloat16 on the meta device: all shapes, no memory."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def token_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    """Return the same random rows of token ids, (rows, length), at every call."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the model's answer to `token_ids()`, (rows, length, vocabulary)."""
    with torch.no_grad():
        return model(token_ids()).logits


def bottleneck_config(**settings: object) -> BottleneckConfig:
    """Return a configuration of size 4, unless the settings say otherwise."""
    return BottleneckConfig(**{"task_type": "CAUSAL_LM", "bottleneck_size": 4, **settings})


def with_bottleneck(
    base: PreTrainedModel, adapter_name: str = "default", **settings: object
) -> PeftModel:
    """Return the base with a bottleneck adapter, in evaluation mode."""
    return get_peft_model(base, bottleneck_config(**settings), adapter_name=adapter_name).eval()


def train_steps(model: torch.nn.Module, steps: int = 1, learning_rate: float = 1e-2) -> list[float]:
    """Train on `token_ids()`, leave the model in evaluation mode; return each step's loss."""
    ids = token_ids()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def _with_vision(model_type: str) -> PretrainedConfig:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return AutoConfig.for_model(model_type, text_config=_COMMON, vision_config=vision)
