"""Architectures read from config.json equal the models that transformers builds from it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
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
from peftcli.errors import ArtefactError, RecipeError

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


NAMES = (["q_proj", "v_proj"], ["self_attn.q_proj"], ["proj"], ["lm_head"])
PATHS = (["model.layers.0.mlp.up_proj"], r".*\.(q|k)_proj", r"q_proj", r".*layers\.1\..*")


@pytest.mark.parametrize(
    ("target", "layers"),
    [(names, layers) for names in NAMES for layers in (None, [0], 1, [])]
    + [(path, None) for path in PATHS],
)
def test_targets_match_as_in_peft(target: Any, layers: Any, tmp_path: Path) -> None:
    config = tiny_config("llama")
    peft_config = LoraConfig(target_modules=target, layers_to_transform=layers)
    modules = linears_of(on_meta(config))
    wanted = {name for name in modules if check_target_module_exists(peft_config, name)}
    if target == ["lm_head"] and layers in ([0], 1):
        wanted = set()  # PEFT takes a whole path in every layer; ours keeps to the layers named
    found = linear_shapes(saved(config, tmp_path), target, layers)
    assert {path for linear in found for path, _ in linear.paths()} == wanted


def test_all_linear_leaves_the_head_out_and_takes_the_vision_tower(tmp_path: Path) -> None:
    architecture = saved(config_of("gemma3", {}), tmp_path)
    found = linear_shapes(architecture, "all-linear", [0])
    assert {linear.kind for linear in found} == {"attention", "mlp", "vision"}
    assert all(linear.layers == (0,) for linear in found)


def test_a_wrong_expression_is_named() -> None:
    with pytest.raises(RecipeError, match="regular expression"):
        linear_shapes(architecture_from(PLAIN), "(")


PLAIN = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}


def test_an_unknown_family_is_taken_for_a_plain_decoder() -> None:
    known = architecture_from(PLAIN)
    unknown = architecture_from({**PLAIN, "model_type": "brand_new"})
    assert not unknown.exact
    assert unknown.parameters() == known.parameters()
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sparse = architecture_from({**PLAIN, **mixture, "model_type": "brand_new"})
    assert sum(e.parameters() for e in sparse.experts) == 2 * 4 * 3 * 16 * 32


def test_an_unknown_wrapper_gives_its_language_model() -> None:
    wrapped = architecture_from({"model_type": "seeing_llama", "text_config": PLAIN})
    assert not wrapped.exact
    assert wrapped.parameters() == architecture_from(PLAIN).parameters()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 1e30}, "vocab_size is 1e[+]30"),
        ({"vocab_size": math.nan}, "vocab_size is nan"),
        ({"vocab_size": "128"}, "vocab_size is '128'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size is 32"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"quantization_config": 3}, "quantization_config is 3"),
        ({"model_type": 7}, "model_type is 7"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": None, "tokenizer_class": "X"}, "configuration of a tokenizer"),
        ({"model_type": None, "peft_type": "LORA"}, "configuration of an adapter"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no causal language model"),
        ({"model_type": "new", "is_encoder_decoder": True}, "no causal language model"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ArtefactError, match=named) as caught:
        architecture_from({**PLAIN, **change}, where="x/config.json")
    assert caught.value.message.startswith("x/config.json: ")
    assert caught.value.hint


@pytest.mark.parametrize("content", ["[1]", '"text"', "{", "\x00", "[" * 100_000, "null"])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"config\.json"):
        read_architecture(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such file"):
        read_architecture(tmp_path)


OTHER_KEYS = (
    *("head_dim", "num_experts", "mlp_only_layers", "layers_block_type", "text_config"),
    *("vision_config", "quantization_config", "sliding_window"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*sorted(LAYOUTS), "gemma3", "other"]),
    st.dictionaries(
        st.sampled_from([*PLAIN, *OTHER_KEYS]),
        JSON,
    ),
)
def test_no_configuration_crashes(model_type: str, values: dict[str, Any]) -> None:
    try:
        architecture = architecture_from({**PLAIN, **values, "model_type": model_type})
    except ArtefactError:
        return
    assert architecture.parameters() > 0


def test_reading_imports_no_heavy_library() -> None:
    code = (
        "import sys, peftcli.architecture.config as c;"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pydantic'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
