"""Families whose modules depend on more keys than a row of `layouts.py` can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peftcli.architecture.keys import Keys
from peftcli.architecture.layout import Layout, Mixture
from peftcli.architecture.layouts import LAYOUTS

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def adjusted(model_type: str, keys: Keys, layout: Layout) -> Layout:
    """The family's layout as this config wants it."""
    quirk = _QUIRKS.get(model_type)
    return quirk(keys, layout) if quirk else layout


def assumed_layout(keys: Keys) -> Layout:
    """What an unknown family most likely is: Llama's layout, with experts where keys name some."""
    if keys.find(*EXPERT_COUNTS)[1] is None:
        return LAYOUTS["llama"]
    shared = "shared_experts" if keys.optional("n_shared_experts", low=0) else ""
    mixture = Mixture(
        count=EXPERT_COUNTS,
        size=("moe_intermediate_size", "intermediate_size"),
        shared=shared,
        shared_size=("moe_intermediate_size", "intermediate_size"),
        shared_count="n_shared_experts",
    )
    return replace(LAYOUTS["llama"], mixture=mixture)


def _falcon(keys: Keys, layout: Layout) -> Layout:
    grouped = keys.flag("new_decoder_architecture", False)
    kv_heads = None if grouped or not keys.flag("multi_query", True) else 1
    if not grouped and kv_heads is None:
        kv_heads = keys.integer("num_attention_heads", "n_head")
    norms: tuple[str, ...] = ("input_layernorm",)
    if not keys.flag("parallel_attn", True):
        norms = ("post_attention_layernorm", "input_layernorm")
    elif grouped and keys.optional("num_ln_in_parallel_attn") in (None, 2):
        norms = ("ln_attn", "ln_mlp")
    return replace(layout, kv_heads=kv_heads, norms=norms)


def _gpt_bigcode(keys: Keys, layout: Layout) -> Layout:
    return replace(layout, kv_heads=1 if keys.flag("multi_query", True) else None)


def _opt(keys: Keys, layout: Layout) -> Layout:
    if not keys.flag("layer_norm_elementwise_affine", True):
        return replace(layout, norms=(), final_norm="")
    last = keys.flag("do_layer_norm_before", True) and not keys.flag(
        "_remove_final_layer_norm", False
    )
    return replace(layout, final_norm=layout.final_norm if last else "")


def _stablelm(keys: Keys, layout: Layout) -> Layout:
    parallel = keys.flag("use_parallel_residual", False)
    return replace(layout, norms=layout.norms[:1]) if parallel else layout


_QUIRKS: dict[str, Callable[[Keys, Layout], Layout]] = {
    "falcon": _falcon,
    "gpt_bigcode": _gpt_bigcode,
    "opt": _opt,
    "stablelm": _stablelm,
}
