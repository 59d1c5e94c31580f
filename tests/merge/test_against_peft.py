"""The merged weights are those of PEFT's own merge in float32, bit for bit after the cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, TrainableTokensConfig

BFLOAT, FLOAT = torch.bfloat16, torch.float32
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora(**values: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": "all-linear", **values})


def attention(**values: Any) -> LoraConfig:
    return lora(**{"target_modules": ["q_proj", "o_proj"], **values})


FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2"),
    *("opt", "falcon", "bloom", "mpt", "phi", "stablelm", "gpt_bigcode", "codegen", "gemma3"),
)
ROUTED = ("qwen3_moe", "mixtral", "deepseek_v3", "minimax_m2", "olmoe", "granitemoe")
LLAMA: dict[str, PeftConfig] = {
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"q_proj": 7, r".*\.0\..*mlp.*": 2}, alpha_pattern={"k_proj": 3}),
    "layers": attention(layers_to_transform=[1]),
    "regular expression": lora(target_modules=r".*layers\.1\..*(q|v)_proj"),
    "dora and rslora": lora(use_dora=True, use_rslora=True),
    "gaussian start": attention(init_lora_weights="gaussian"),
    "head": attention(target_modules=["q_proj", "lm_head"]),
    "embedding": attention(target_modules=["q_proj", "embed_tokens"]),
    "dora on embedding": attention(target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "head whole": attention(modules_to_save=["lm_head"]),
    "embedding whole": attention(modules_to_save=["embed_tokens", "lm_head"]),
    "norms whole": attention(modules_to_save=["input_layernorm", "norm"]),
    "token rows": attention(trainable_token_indices=[3, 5, 9]),
    "token rows of both": attention(
        trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [4, 5]}
    ),
    "token rows alone": TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[2, 7]),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
}
OTHERS: dict[str, tuple[str, PeftConfig]] = {
    "all biases": ("qwen2", lora(bias="all")),
    "biases of targets": ("opt", lora(bias="lora_only")),
    "bias of the update": ("opt", lora(target_modules=["q_proj", "fc1"], lora_bias=True)),
    "wrong fan_in_fan_out": ("gpt2", lora(fan_in_fan_out=False)),
    "dora on Conv1D": ("gpt2", lora(use_dora=True)),
    "ia3 on Conv1D": ("gpt2", IA3Config(task_type="CAUSAL_LM")),
    "ia3 with biases": ("opt", IA3Config(task_type="CAUSAL_LM")),
    "experts, transposed": ("gpt_oss", attention(target_parameters=EXPERTS)),
    "experts alone": ("qwen3_moe", lora(target_modules=[], target_parameters=EXPERTS)),
    "experts, one file tensor": (
        "granitemoe",
        attention(target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "experts, other names": ("phimoe", attention(target_parameters=EXPERTS)),
    "experts whole": ("qwen3_moe", attention(modules_to_save=["experts"])),
    "router whole": ("qwen3_moe", attention(modules_to_save=["gate"])),
}


def check(case: Any, **options: Any) -> None:
    result = case.merge(verify=False, **options)
    expected, found = case.by_peft(), case.loaded().state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert result.precision.touched > 0


@pytest.mark.parametrize("model_type", FAMILIES + ROUTED)
def test_lora_on_family(model_type: str, make_case: Callable[..., Any]) -> None:
    check(make_case(model_type, lora()))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "falcon", "gemma3_text", "deepseek_v3"])
def test_dora_on_family(model_type: str, make_case: Callable[..., Any]) -> None:
    config = lora(use_dora=True)
    if model_type == "deepseek_v3":  # fused experts take no DoRA
        config = lora(use_dora=True, target_modules=["q_b_proj", "kv_b_proj", "o_proj"])
    check(make_case(model_type, config))


@pytest.mark.parametrize("method", LLAMA)
def test_method_on_llama(method: str, make_case: Callable[..., Any]) -> None:
    check(make_case("llama", LLAMA[method], dtype=FLOAT, tied=False))


@pytest.mark.parametrize("method", OTHERS)
def test_method_on_another_family(method: str, make_case: Callable[..., Any]) -> None:
    model_type, config = OTHERS[method]
    check(make_case(model_type, config))


def test_several_shards(make_case: Callable[..., Any]) -> None:
    case = make_case("qwen2", lora(), shards="60KB")
    check(case)
    names = {file.name for file in case.base.glob("*.safetensors")}
    assert len(names) > 2
    assert {file.name for file in case.output.glob("*.safetensors")} == names


@pytest.mark.parametrize("save_dtype", ["float32", "float16"])
def test_other_saved_dtype(save_dtype: str, make_case: Callable[..., Any]) -> None:
    case = make_case("llama", lora())
    result = case.merge(save_dtype=save_dtype, verify=False)
    dtype = getattr(torch, save_dtype)
    model = case.load_base()
    expected = {name: tensor.to(dtype) for name, tensor in _merged(case, model).items()}
    found = case.loaded("auto").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert result.dtypes == {save_dtype: len(found)}


def test_arithmetic_in_the_bases_dtype(make_case: Callable[..., Any]) -> None:
    """`--no-fp32` is what PEFT does on a base loaded in 16 bits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    case = make_case("llama", lora())
    case.merge(fp32=False, verify=False)
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=BFLOAT)
    merged = PeftModel.from_pretrained(base, case.adapter).merge_and_unload(safe_merge=True)
    found = case.loaded().state_dict()
    expected = merged.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    exact = case.by_peft()
    assert any(not torch.equal(found[name], exact[name]) for name in exact)


def _merged(case: Any, model: Any) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, case.adapter).merge_and_unload().state_dict()
