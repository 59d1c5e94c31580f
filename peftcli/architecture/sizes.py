"""The sizes that every decoder's config has, under one name each."""

from __future__ import annotations

from dataclasses import dataclass

from peftcli.architecture.keys import MOST_LAYERS, Keys
from peftcli.architecture.layout import Layout, Switch


@dataclass(frozen=True, eq=False)
class Sizes:
    """The numbers that every decoder's config has, under one name each."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_size


def read_sizes(keys: Keys, layout: Layout) -> Sizes:
    """Read and cross-check the sizes; raises ArtefactError that names the key at fault."""
    hidden = keys.integer("hidden_size", "n_embd", "d_model", "n_embed")
    heads = keys.integer("num_attention_heads", "n_head", "n_heads", "num_heads")
    kv_heads = (
        layout.kv_heads or (keys.optional(*layout.kv_keys) if layout.kv_keys else None) or heads
    )
    if heads % kv_heads:
        raise keys.wrong("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    head_size = _head_size(keys, layout, hidden, heads)
    wide = keys.optional(*layout.intermediate)
    if wide is None:
        wide = layout.widening * hidden if layout.widening else keys.integer(*layout.intermediate)
    return Sizes(
        hidden=hidden,
        layers=keys.integer(
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", high=MOST_LAYERS
        ),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate=wide,
        vocab=keys.integer("vocab_size"),
    )


def _head_size(keys: Keys, layout: Layout, hidden: int, heads: int) -> int:
    if layout.latent:
        return keys.integer("qk_rope_head_dim") + keys.integer("qk_nope_head_dim")
    named = keys.optional(*layout.head_size_keys) if layout.head_size_keys else None
    size = named or layout.head_size
    if size is None and hidden % heads:
        raise keys.wrong("hidden_size", hidden, f"a multiple of the {heads} heads")
    return size or hidden // heads


def switch(keys: Keys, value: Switch) -> bool:
    return value if isinstance(value, bool) else keys.flag(*value)
