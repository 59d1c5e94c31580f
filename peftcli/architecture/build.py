"""Puts a decoder together from its config's keys, its family's names and its layout."""

from __future__ import annotations

from dataclasses import replace

from peftcli.architecture.attention import attention, latent_attention, query_norms
from peftcli.architecture.experts import mixture_groups, sparse_layers
from peftcli.architecture.families import Family
from peftcli.architecture.keys import Keys
from peftcli.architecture.layout import Layout
from peftcli.architecture.shapes import Experts, Linear, Tensor
from peftcli.architecture.sizes import Sizes, switch

Groups = tuple[tuple[Linear, ...], tuple[Experts, ...], tuple[Tensor, ...]]

PLAIN_NAMES = Family(
    model_types=(),
    layers="model.layers",
    attention_out="self_attn.o_proj",
    mlp_out="mlp.down_proj",
    mlp="mlp",
    attention_linears=tuple(f"self_attn.{x}_proj" for x in "qkvo"),
    mlp_linears=tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
OTHER_NAMES: dict[str, Family] = {
    # Remote code, not in transformers.
    "internlm2": Family(
        model_types=("internlm2",),
        layers="model.layers",
        attention_out="attention.wo",
        mlp_out="feed_forward.w2",
        mlp="feed_forward",
        attention_linears=("attention.wqkv", "attention.wo"),
        mlp_linears=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
    ),
    "llama4_text": replace(
        PLAIN_NAMES,
        model_types=("llama4_text",),
        mlp_out="feed_forward",
        mlp="feed_forward",
        mlp_linears=tuple(f"feed_forward.{x}_proj" for x in ("gate", "up", "down")),
        experts="feed_forward.experts",
        expert_parameters=("gate_up_proj", "down_proj"),
    ),
}


def build(keys: Keys, layout: Layout, family: Family, sizes: Sizes) -> Groups:
    """All parameters of the model as groups of equal linear modules, experts and tensors."""
    every = tuple(range(sizes.layers))
    sparse = sparse_layers(keys, layout.mixture, sizes.layers)
    dense = tuple(i for i in every if i not in set(sparse))
    attend = latent_attention if layout.latent else attention
    linears = [*attend(keys, layout, family, sizes, every)]
    tensors = [*embeddings(keys, layout, family, sizes)]
    experts: list[Experts] = []
    if dense:
        linears += mlp(keys, layout, family, sizes, dense)
    if sparse and layout.mixture:
        more, experts, small = mixture_groups(keys, layout.mixture, family, sizes.hidden, sparse)
        linears += more
        tensors += small
    linears += projections(keys, family, sizes)
    linears.append(head(layout, keys, sizes))
    tensors += norms(keys, layout, family, sizes, every)
    return tuple(linears), tuple(experts), tuple(tensors)


def mlp(
    keys: Keys, layout: Layout, family: Family, sizes: Sizes, layers: tuple[int, ...]
) -> list[Linear]:
    """The dense feed-forward block: [gate,] up and down; gate and up may be one projection."""
    names = [name for name in family.mlp_linears if "shared_expert" not in name]
    *inputs, output = (f"{family.layers}.{{}}.{name}" for name in names or PLAIN_NAMES.mlp_linears)
    bias = switch(keys, layout.mlp_bias)
    width = sizes.intermediate * (2 if layout.gate_in_up else 1)
    return [
        *(
            Linear(name, sizes.hidden, width, bias, layers, "mlp", layout.quantizable)
            for name in inputs
        ),
        Linear(output, sizes.intermediate, sizes.hidden, bias, layers, "mlp", layout.quantizable),
    ]


def head(layout: Layout, keys: Keys, sizes: Sizes) -> Linear:
    """The output embedding; it stands outside the layers and is never quantised."""
    width = keys.optional("word_embed_proj_dim") or sizes.hidden
    return Linear(
        layout.head,
        width,
        sizes.vocab,
        switch(keys, layout.head_bias),
        (),
        "head",
        quantizable=False,
    )


def embeddings(keys: Keys, layout: Layout, family: Family, sizes: Sizes) -> list[Tensor]:
    root = family.layers.rpartition(".")[0]
    width = keys.optional("word_embed_proj_dim") or sizes.hidden
    found = [Tensor(f"{root}.{layout.embedding}", (sizes.vocab, width), kind="embedding")]
    if layout.positions:
        rows = keys.integer("max_position_embeddings", "n_positions", "n_ctx")
        shape = (rows + layout.position_offset, sizes.hidden)
        found.append(Tensor(f"{root}.{layout.positions}", shape, kind="embedding"))
    return found


def norms(
    keys: Keys, layout: Layout, family: Family, sizes: Sizes, layers: tuple[int, ...]
) -> list[Tensor]:
    """Norms of the stream, of queries and keys, and the few other vectors of attention."""
    root, width = family.layers.rpartition(".")[0], (sizes.hidden,)
    ends = [f"{root}.{name}" for name in (layout.embedding_norm, layout.final_norm) if name]
    rows: list[tuple[str, tuple[int], tuple[int, ...]]] = [(name, width, ()) for name in ends]
    rows += [(f"{family.layers}.{{}}.{name}", width, layers) for name in layout.norms]
    found = [Tensor(f"{name}.weight", shape, where) for name, shape, where in rows]
    if layout.norm_bias:
        found += [Tensor(f"{name}.bias", shape, where) for name, shape, where in rows]
    found += [
        Tensor(f"{family.layers}.{{}}.{name}", (1,), layers, "other") for name in layout.scalars
    ]
    return found + query_norms(keys, layout, family, sizes, layers)


def projections(keys: Keys, family: Family, sizes: Sizes) -> list[Linear]:
    """What joins an embedding of another width to the layers (OPT-350m)."""
    width = keys.optional("word_embed_proj_dim") or sizes.hidden
    if width == sizes.hidden:
        return []
    root = family.layers.rpartition(".")[0]
    return [
        Linear(f"{root}.project_out", sizes.hidden, width, False, (), "mlp"),
        Linear(f"{root}.project_in", width, sizes.hidden, False, (), "mlp"),
    ]
