"""Layouts of families with GPT-2's traits: norms with biases, or a feed-forward without a gate."""

from __future__ import annotations

from dataclasses import replace

from peftcli.architecture.layout import Layout

GPT2 = Layout(
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    norms=("ln_1", "ln_2"),
    norm_bias=True,
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    tied=True,
    head_size_keys=(),
    kv_keys=(),
    intermediate=("n_inner",),
    widening=4,
)
BLOOM = replace(
    GPT2,
    norms=("input_layernorm", "post_attention_layernorm"),
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    positions="",
    intermediate=("n_inner",),
)
PHI = replace(
    GPT2,
    norms=("input_layernorm",),
    query_norms=("qk_layernorm", False),
    embedding="embed_tokens",
    positions="",
    final_norm="final_layernorm",
    head_bias=True,
    tied=False,
    kv_keys=("num_key_value_heads",),
    intermediate=("intermediate_size",),
)
GPTJ = replace(
    GPT2,
    qkv_bias=False,
    output_bias=False,
    head_bias=True,
    norms=("ln_1",),
    positions="",
    tied=False,
)
STARCODER2_BIAS = ("use_bias", True)

GPT_LAYOUTS: dict[str, Layout] = {
    "phi": PHI,
    "starcoder2": Layout(
        qkv_bias=STARCODER2_BIAS,
        output_bias=STARCODER2_BIAS,
        mlp_bias=STARCODER2_BIAS,
        norm_bias=True,
        tied=True,
    ),
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": replace(GPT2, qkv_bias=False, intermediate=("intermediate_size",)),
    "gptj": GPTJ,
    "gpt_neox": replace(
        BLOOM,
        qkv_bias=("attention_bias", True),
        output_bias=("attention_bias", True),
        embedding="embed_in",
        embedding_norm="",
        final_norm="final_layer_norm",
        tied=False,
        intermediate=("intermediate_size",),
        widening=None,
    ),
    "bloom": BLOOM,
    "falcon": replace(
        BLOOM,
        qkv_bias=("bias", False),
        output_bias=("bias", False),
        mlp_bias=("bias", False),
        embedding_norm="",
        kv_keys=("num_kv_heads",),
        intermediate=("ffn_hidden_size",),
        quantizable=False,
    ),
    "opt": Layout(
        qkv_bias=("enable_bias", True),
        output_bias=("enable_bias", True),
        mlp_bias=("enable_bias", True),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        norm_bias=True,
        positions="embed_positions",
        position_offset=2,
        final_norm="final_layer_norm",
        tied=True,
        head_size_keys=(),
        kv_keys=(),
        intermediate=("ffn_dim",),
    ),
    "stablelm": Layout(
        qkv_bias=("use_qkv_bias", False),
        output_bias=False,
        norm_bias=True,
        query_norms=("qk_layernorm", False),
        query_norm_span="heads",
    ),
    "nemotron": Layout(mlp_bias=("mlp_bias", False), norm_bias=True),
    "codegen": GPTJ,
    "mpt": replace(
        GPT2,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        norms=("norm_1", "norm_2"),
        norm_bias=False,
        positions="",
        final_norm="norm_f",
    ),
    "persimmon": replace(
        PHI,
        norms=("input_layernorm", "post_attention_layernorm"),
        query_norms=("qk_layernorm", True),
        head_bias=False,
        kv_keys=(),
    ),
}
