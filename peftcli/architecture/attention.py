"""The linear modules, norms and small parameters inside attention."""

from __future__ import annotations

from peftcli.architecture.families import Family
from peftcli.architecture.keys import Keys
from peftcli.architecture.layout import Layout
from peftcli.architecture.shapes import Linear, Tensor
from peftcli.architecture.sizes import Sizes, switch


def attention(
    keys: Keys, layout: Layout, family: Family, sizes: Sizes, layers: tuple[int, ...]
) -> list[Linear]:
    """Query, key and value, in one projection or three, and the output projection."""
    *inputs, output = (f"{family.layers}.{{}}.{name}" for name in family.attention_linears)
    widths = [sizes.query, sizes.key, sizes.key]
    if len(inputs) == 1:
        widths = [sum(widths)]
    bias, out_bias = switch(keys, layout.qkv_bias), switch(keys, layout.output_bias)
    return [
        *(
            Linear(name, sizes.hidden, width, bias, layers, "attention", layout.quantizable)
            for name, width in zip(_ordered(inputs), widths, strict=True)
        ),
        Linear(
            output, sizes.query, sizes.hidden, out_bias, layers, "attention", layout.quantizable
        ),
    ]


def _ordered(inputs: list[str]) -> list[str]:
    """Query, key, value in this order, whatever the order of the family's row."""
    ranks = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
    return sorted(inputs, key=lambda name: ranks.get(name.rsplit(".", 1)[-1], 0))


def latent_attention(
    keys: Keys, layout: Layout, family: Family, sizes: Sizes, layers: tuple[int, ...]
) -> list[Linear]:
    """DeepSeek's multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    bias = switch(keys, layout.qkv_bias)
    rope = keys.integer("qk_rope_head_dim")
    plain = keys.integer("qk_nope_head_dim")
    value = keys.integer("v_head_dim")
    query_rank, rank = keys.optional("q_lora_rank"), keys.integer("kv_lora_rank")
    query = sizes.heads * (rope + plain)
    rows = [
        ("kv_a_proj_with_mqa", sizes.hidden, rank + rope, bias),
        ("kv_b_proj", rank, sizes.heads * (plain + value), False),
        ("o_proj", sizes.heads * value, sizes.hidden, bias),
    ]
    if query_rank is None:
        rows.insert(0, ("q_proj", sizes.hidden, query, False))
    else:
        rows.insert(0, ("q_a_proj", sizes.hidden, query_rank, bias))
        rows.insert(1, ("q_b_proj", query_rank, query, False))
    return [
        Linear(f"{family.layers}.{{}}.self_attn.{name}", i, o, b, layers, "attention")
        for name, i, o, b in rows
    ]


def query_norms(
    keys: Keys, layout: Layout, family: Family, sizes: Sizes, layers: tuple[int, ...]
) -> list[Tensor]:
    """Norms inside attention, of one head's width or of all heads'; and gpt-oss's sinks."""
    inner = f"{family.layers}.{{}}.self_attn."
    if layout.latent:
        ranks = {"q_a": keys.optional("q_lora_rank"), "kv_a": keys.integer("kv_lora_rank")}
        return [
            Tensor(f"{inner}{name}_layernorm.weight", (rank,), layers)
            for name, rank in ranks.items()
            if rank
        ]
    if layout.sinks:
        return [Tensor(f"{inner}sinks", (sizes.heads,), layers, "other")]
    if not switch(keys, layout.query_norms):
        return []
    one = layout.query_norm_span == "head"
    found = [
        Tensor(f"{inner}{name}.weight", (1 if one else heads, sizes.head_size), layers)
        for name, heads in (("q_norm", sizes.heads), ("k_norm", sizes.kv_heads))
    ]
    if layout.norm_bias and one:  # Phi
        found += [Tensor(x.name.replace("weight", "bias"), x.shape, layers) for x in found]
    return found
