"""One entry per model family: where its layers are and what their linear modules are called.

Names are those of transformers 5, relative to one layer, and every entry is checked against a
tiny instance of the model by the tests. A new family is one entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Placement = Literal["houlsby", "pfeiffer", "parallel"]


@dataclass(frozen=True, eq=False)
class Family:
    """Module names of the model types that share one layout.

    `attention_out` and `mlp_out` are the modules whose output goes to the residual stream, which is
    where bottleneck adapters sit. `mlp` is the feed-forward block as one module, or empty where the
    layer holds its linears directly. `experts` is the module that holds all experts as the fused
    `expert_parameters`, which PEFT calls `target_parameters`.
    """

    model_types: tuple[str, ...]
    layers: str
    attention_out: str
    mlp_out: str
    mlp: str
    attention_linears: tuple[str, ...]
    mlp_linears: tuple[str, ...]
    experts: str = ""
    expert_parameters: tuple[str, ...] = ()
    conv1d: bool = False  # weights are stored as (inputs, outputs)
    other_towers: str = ""  # regular expression of the modules that are not the language model

    def adapter_sites(self, placement: Placement) -> tuple[str, ...]:
        """Return the modules of a layer that carry an adapter; empty if it has no such place."""
        if placement == "parallel":
            return (self.mlp,) if self.mlp else ()
        if placement == "pfeiffer":
            return (self.mlp_out,)
        return (self.attention_out, self.mlp_out)


def family_of(model_type: str) -> Family | None:
    """Return the family of a `model_type` as `config.json` spells it, None if it is not known."""
    return _by_model_type().get(model_type)


@cache
def _by_model_type() -> dict[str, Family]:
    return {name: family for family in FAMILIES for name in family.model_types}


def _inside(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


_QKVO = _inside("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_MLA = _inside(
    "self_attn", "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"
)
_GATED = _inside("mlp", "gate_proj", "up_proj", "down_proj")
_SHARED_EXPERT = _inside("mlp.shared_expert", "gate_proj", "up_proj", "down_proj")
_SHARED_EXPERTS = _inside("mlp.shared_experts", "gate_proj", "up_proj", "down_proj")
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


def _llama_like(
    *model_types: str,
    layers: str = "model.layers",
    attention: tuple[str, ...] = _QKVO,
    mlp: tuple[str, ...] = _GATED,
    other_towers: str = "",
) -> Family:
    return Family(
        model_types=model_types,
        layers=layers,
        attention_out=attention[-1],
        mlp_out=mlp[-1],
        mlp="mlp",
        attention_linears=attention,
        mlp_linears=mlp,
        other_towers=other_towers,
    )


def _mixture(
    *model_types: str,
    mlp: tuple[str, ...] = (),
    block: str = "mlp",
    attention: tuple[str, ...] = _QKVO,
) -> Family:
    """Build the entry of a mixture of experts; its adapter sits on the output of the block."""
    return Family(
        model_types=model_types,
        layers="model.layers",
        attention_out="self_attn.o_proj",
        mlp_out=block,
        mlp=block,
        attention_linears=attention,
        mlp_linears=mlp,
        experts=f"{block}.experts",
        expert_parameters=_EXPERT_PARAMETERS,
    )


def _gpt_like(
    *model_types: str,
    attention: tuple[str, ...],
    mlp: tuple[str, ...],
    layers: str = "transformer.h",
    block: str = "mlp",
    conv1d: bool = False,
) -> Family:
    return Family(
        model_types=model_types,
        layers=layers,
        attention_out=attention[-1],
        mlp_out=mlp[-1],
        mlp=block,
        attention_linears=attention,
        mlp_linears=mlp,
        conv1d=conv1d,
    )


FAMILIES: tuple[Family, ...] = (
    _llama_like(
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2"),
        *("gemma3_text", "stablelm", "granite", "smollm3", "olmo", "olmo2", "olmo3", "cohere"),
        *("cohere2", "exaone4", "helium", "seed_oss", "ernie4_5", "hunyuan_v1_dense"),
    ),
    _llama_like(
        "gemma3", layers="model.language_model.layers", other_towers=r".*\.vision_tower(\..*)?"
    ),
    _llama_like("arcee", "apertus", "nemotron", mlp=_inside("mlp", "up_proj", "down_proj")),
    _llama_like("glm", "glm4", mlp=_inside("mlp", "gate_up_proj", "down_proj")),
    _llama_like(
        "phi3",
        attention=_inside("self_attn", "qkv_proj", "o_proj"),
        mlp=_inside("mlp", "gate_up_proj", "down_proj"),
    ),
    _llama_like(
        "phi",
        attention=_inside("self_attn", "q_proj", "k_proj", "v_proj", "dense"),
        mlp=_inside("mlp", "fc1", "fc2"),
    ),
    _llama_like("nanochat", mlp=_inside("mlp", "fc1", "fc2")),
    _llama_like("starcoder2", mlp=_inside("mlp", "c_fc", "c_proj")),
    _llama_like(
        "persimmon",
        attention=_inside("self_attn", "query_key_value", "dense"),
        mlp=_inside("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    _mixture("mixtral", "qwen3_moe", "olmoe", "phimoe", "minimax_m2", "gpt_oss"),
    _mixture("qwen2_moe", mlp=(*_SHARED_EXPERT, "mlp.shared_expert_gate")),
    _mixture("deepseek_v2", "deepseek_v3", attention=_MLA, mlp=(*_GATED, *_SHARED_EXPERTS)),
    _mixture("glm4_moe", "ernie4_5_moe", mlp=(*_GATED, *_SHARED_EXPERTS)),
    _mixture("granitemoe", block="block_sparse_moe"),
    _gpt_like(
        "gpt_neox",
        layers="gpt_neox.layers",
        attention=_inside("attention", "query_key_value", "dense"),
        mlp=_inside("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    _gpt_like(
        "falcon",
        "bloom",
        attention=_inside("self_attention", "query_key_value", "dense"),
        mlp=_inside("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    _gpt_like(
        "gpt2",
        attention=_inside("attn", "c_attn", "c_proj"),
        mlp=_inside("mlp", "c_fc", "c_proj"),
        conv1d=True,
    ),
    _gpt_like(
        "gpt_bigcode",
        attention=_inside("attn", "c_attn", "c_proj"),
        mlp=_inside("mlp", "c_fc", "c_proj"),
    ),
    _gpt_like(
        "gptj",
        attention=_inside("attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=_inside("mlp", "fc_in", "fc_out"),
    ),
    _gpt_like(
        "codegen",
        attention=_inside("attn", "qkv_proj", "out_proj"),
        mlp=_inside("mlp", "fc_in", "fc_out"),
    ),
    _gpt_like(
        "gpt_neo",
        attention=_inside("attn.attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=_inside("mlp", "c_fc", "c_proj"),
    ),
    _gpt_like(
        "mpt",
        layers="transformer.blocks",
        attention=_inside("attn", "Wqkv", "out_proj"),
        mlp=_inside("ffn", "up_proj", "down_proj"),
        block="ffn",
    ),
    _gpt_like(
        "opt",
        layers="model.decoder.layers",
        attention=_inside("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        block="",
    ),
)
