"""What the layers of an architecture are, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from peftcli.architecture.config import Architecture, Linear

WRITERS = (  # linears whose output goes to the stream, by the last part of their names
    *("o_proj", "down_proj", "out_proj", "dense", "c_proj", "wo", "w2", "fc2", "fc_out"),
    *("dense_4h_to_h", "project_out"),
)


@dataclass(frozen=True)
class Widths:
    """Widths of a layer: the stream, queries, keys, and the intermediate of one kind of layer."""

    hidden: int
    query: int
    key: int
    intermediate: int
    gated: bool
    indices: tuple[int, ...]
    """The layers of this kind."""

    @property
    def layers(self) -> int:
        return len(self.indices)

    def layers_below(self, end: int) -> int:
        """How many of them lie below that layer of the model."""
        return sum(i < end for i in self.indices)

    def above(self, start: int) -> Widths:
        """Those from that layer of the model on."""
        return replace(self, indices=tuple(i for i in self.indices if i >= start))


@lru_cache(64)
def layer_kinds(architecture: Architecture) -> tuple[Widths, ...]:
    """The kinds of layers by their feed-forward block: dense, and with experts."""
    dense = sorted({i for x in _of_text(architecture) if x.kind == "mlp" for i in x.layers})
    sparse = sorted({i for x in architecture.experts for i in x.layers})
    dense = [i for i in dense if i not in set(sparse)]
    kinds = []
    if dense or not sparse:
        kinds.append(_widths(architecture, architecture.intermediate, dense))
    if sparse:
        kinds.append(_widths(architecture, _routed_width(architecture), sparse))
    idle = sorted(set(range(architecture.layers)) - set(dense) - set(sparse))
    if idle:  # attention or Mamba alone
        kinds.append(_widths(architecture, 0, idle))
    return tuple(kind for kind in kinds if kind.layers)


def _widths(architecture: Architecture, intermediate: int, layers: list[int]) -> Widths:
    ups = [x for x in _of_text(architecture) if x.kind == "mlp" and x.suffix not in WRITERS]
    names = {x.suffix for x in ups} | {x.name.rsplit(".", 1)[-1] for x in architecture.experts}
    gated = bool(names & {"gate_proj", "gate_up_proj", "w1"})
    return Widths(
        hidden=architecture.hidden_size,
        query=architecture.heads * architecture.head_size,
        key=architecture.kv_heads * architecture.head_size,
        intermediate=intermediate,
        gated=gated,
        indices=tuple(layers),
    )


def _routed_width(architecture: Architecture) -> int:
    """Intermediate width that a token meets: its experts' and the shared one's."""
    downs = [x for x in architecture.experts if x.name.endswith("down_proj")]
    routed = max((x.active * x.shape[-1] for x in downs if len(x.shape) > 1), default=0)
    if downs and downs[0].shape[-1] == architecture.hidden_size:  # stored as [in, out]
        routed = downs[0].active * downs[0].shape[0]
    shared = [x for x in _of_text(architecture) if "shared_expert" in x.name]
    return routed + max((x.inputs for x in shared if x.suffix in WRITERS), default=0)


def _of_text(architecture: Architecture) -> list[Linear]:
    return [x for x in architecture.linears if x.layers and x.kind != "vision"]


@lru_cache(64)
def stream_norms(architecture: Architecture) -> int:
    """Norms of the stream's width in one layer."""
    width = (architecture.hidden_size,)
    found = [
        x
        for x in architecture.tensors
        if x.layers and x.shape == width and x.kind == "norm" and x.name.endswith("weight")
    ]
    text = [x for x in found if "vision" not in x.name]
    return -(-sum(len(x.layers) for x in text) // architecture.layers)


@lru_cache(64)
def joins_queries(architecture: Architecture) -> bool:
    """Whether queries, keys and values come from one linear and are rotated then, as in Phi-3."""
    return any(x.name.endswith("self_attn.qkv_proj") for x in architecture.linears)


@lru_cache(64)
def has_query_norms(architecture: Architecture) -> bool:
    return any("self_attn.q_norm" in x.name for x in architecture.tensors)
