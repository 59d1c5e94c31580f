"""What the module names of a family leave open: biases, norms, embeddings, experts, defaults.

Names of modules stand in `families.py`; a row here says what transformers 5 builds around them.
"""

from __future__ import annotations

from dataclasses import replace

from peftcli.architecture.gpt_layouts import GPT_LAYOUTS
from peftcli.architecture.layout import Layout, Mixture

SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
GLM4_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
)
PLAIN = Layout(qkv_bias=False, output_bias=False)
LLAMA = Layout(mlp_bias=("mlp_bias", False))
QWEN2 = Layout(qkv_bias=True, output_bias=False)
QWEN3 = Layout(query_norms=True, head_size=128)
QWEN_MOE = Mixture(count=("num_experts", "num_local_experts"))
QWEN2_MOE = replace(
    QWEN_MOE,
    shared="shared_expert",
    shared_size=("shared_expert_intermediate_size",),
    shared_gate="shared_expert_gate",
)
GEMMA = Layout(tied=True, head_size=256)
COHERE = Layout(
    norms=("input_layernorm",),
    tied=True,
    query_norms=("use_qk_norm", False),
    query_norm_span="all",
)
GLM = Layout(qkv_bias=("attention_bias", True), output_bias=False, gate_in_up=True, head_size=128)
DEEPSEEK_MOE = Mixture(
    count=("n_routed_experts", "num_local_experts"),
    shared="shared_experts",
    shared_count="n_shared_experts",
)
OLMO2 = Layout(
    query_norms=True,
    query_norm_span="all",
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}

LAYOUTS: dict[str, Layout] = GPT_LAYOUTS | {
    "llama": LLAMA,
    "mistral": PLAIN,
    "ministral": PLAIN,
    "ministral3": PLAIN,
    "mixtral": replace(PLAIN, mixture=Mixture(size=("intermediate_size",))),
    "qwen2": QWEN2,
    "qwen2_moe": replace(QWEN2, qkv_bias=("qkv_bias", True), mixture=QWEN2_MOE),
    "qwen3": QWEN3,
    "qwen3_moe": replace(QWEN3, head_size=None, mixture=QWEN_MOE),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, norms=SANDWICH, defaults={"attn_logit_softcapping": 50.0}),
    # Saved text sections leave out what equals the defaults of the class.
    "gemma3_text": replace(GEMMA, norms=SANDWICH, query_norms=True, defaults=GEMMA3_DEFAULTS),
    "phi3": replace(PLAIN, gate_in_up=True),
    "granite": LLAMA,
    "granitemoe": Layout(
        mixture=Mixture(block="block_sparse_moe.", router="router", size=("intermediate_size",))
    ),
    "smollm3": replace(LLAMA, tied=True),
    "arcee": LLAMA,
    "olmo": Layout(norms=(), final_norm=""),
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "olmoe": replace(
        OLMO2, norms=LLAMA.norms, mixture=replace(QWEN_MOE, size=("intermediate_size",))
    ),
    "cohere": COHERE,
    "cohere2": replace(COHERE, query_norms=False),
    "glm": GLM,
    "glm4": replace(GLM, norms=GLM4_NORMS),
    "glm4_moe": Layout(output_bias=False, query_norms=("use_qk_norm", False), mixture=DEEPSEEK_MOE),
    "seed_oss": Layout(
        qkv_bias=("attention_bias", True),
        output_bias=("attention_out_bias", False),
        mlp_bias=("mlp_bias", False),
        head_size=128,
    ),
    "exaone4": replace(OLMO2, qkv_bias=False, output_bias=False, query_norm_span="head"),
    "ernie4_5": Layout(
        qkv_bias=("use_bias", False),
        output_bias=("use_bias", False),
        mlp_bias=("use_bias", False),
        tied=True,
        head_size=128,
    ),
    "hunyuan_v1_dense": Layout(query_norms=True),
    "internlm2": Layout(
        qkv_bias=("bias", False),
        output_bias=("bias", False),
        norms=("attention_norm", "ffn_norm"),
        embedding="tok_embeddings",
        head="output",
    ),
    "helium": replace(LLAMA, head_size=128),
    "nanochat": Layout(norms=(), final_norm=""),
    "apertus": Layout(
        norms=("attention_layernorm", "feedforward_layernorm"),
        query_norms=True,
        scalars=("mlp.act_fn.alpha_p", "mlp.act_fn.alpha_n"),
    ),
    "phimoe": Layout(
        norm_bias=True,
        head_bias=("lm_head_bias", False),
        mixture=Mixture(router="router", router_linear=True, size=("intermediate_size",)),
    ),
    "minimax_m2": Layout(
        qkv_bias=False,
        output_bias=False,
        head_size=128,
        query_norms=True,
        query_norm_span="all",
        mixture=Mixture(size=("intermediate_size",)),
    ),
    "ernie4_5_moe": Layout(
        qkv_bias=("use_bias", False),
        output_bias=("use_bias", False),
        mlp_bias=("use_bias", False),
        tied=True,
        mixture=Mixture(
            count=("moe_num_experts", "num_experts"),
            shared="shared_experts",
            shared_count="moe_num_shared_experts",
            statics="gate.moe_statics.e_score_correction_bias",
        ),
    ),
    "deepseek_v2": Layout(latent=True, mixture=DEEPSEEK_MOE),
    "deepseek_v3": Layout(latent=True, mixture=DEEPSEEK_MOE),
    "gpt_oss": Layout(
        sinks=True,
        qkv_bias=("attention_bias", True),
        output_bias=("attention_bias", True),
        head_size=64,
        mixture=Mixture(router="router", bias=True, input_first=True, size=("intermediate_size",)),
    ),
    "nemotron_h": Layout(head_size=128),
    "llama4_text": Layout(
        head_size=128,
        intermediate=("intermediate_size_mlp",),
        mixture=Mixture(
            block="feed_forward.",
            router="router",
            router_linear=True,
            input_first=True,
            size=("intermediate_size",),
            shared="shared_expert",
            shared_size=("intermediate_size",),
        ),
    ),
}
