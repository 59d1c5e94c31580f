"""The shape of a row in `layouts.py`: all that a family's module names leave open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Switch = bool | tuple[str, bool]  # a constant, or a config key and its default


@dataclass(frozen=True, eq=False)
class Mixture:
    """The expert layers of a family, by the names of the config's keys and of the modules."""

    count: tuple[str, ...] = ("num_local_experts", "num_experts")
    size: tuple[str, ...] = ("moe_intermediate_size",)
    block: str = "mlp."
    router: str = "gate"
    router_linear: bool = False
    bias: bool = False  # of router and experts
    input_first: bool = False  # expert matrices are stored as [in, out]
    shared: str = ""
    shared_size: tuple[str, ...] = ("moe_intermediate_size",)
    shared_count: str = ""
    shared_gate: str = ""
    statics: str = ""  # a vector of one number for each expert


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything but the names. An empty name means the family has no such module."""

    qkv_bias: Switch = ("attention_bias", False)
    output_bias: Switch = ("attention_bias", False)
    mlp_bias: Switch = False
    head_bias: Switch = False
    gate_in_up: bool = False  # gate and up are one projection
    latent: bool = False  # multi-head latent attention (DeepSeek)
    sinks: bool = False  # a learned attention sink per head (gpt-oss)
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    query_norms: Switch = False
    query_norm_span: str = "head"  # head: one for all heads; heads: one each; all: over all heads
    embedding: str = "embed_tokens"
    embedding_norm: str = ""
    positions: str = ""
    position_offset: int = 0
    final_norm: str = "norm"
    head: str = "lm_head"
    tied: bool = False
    head_size: int | None = None  # where the config has no head_dim; None: hidden size / heads
    head_size_keys: tuple[str, ...] = ("head_dim",)
    kv_keys: tuple[str, ...] = ("num_key_value_heads",)  # none: as many as query heads
    kv_heads: int | None = None  # fixed by the family
    scalars: tuple[str, ...] = ()  # single numbers in each layer
    mixture: Mixture | None = None
    quantizable: bool = True  # bitsandbytes converts nn.Linear and Conv1D, but no subclasses
    intermediate: tuple[str, ...] = ("intermediate_size",)
    widening: int | None = None  # intermediate size in hidden sizes, where the config has none
    defaults: Mapping[str, object] = field(default_factory=dict)
