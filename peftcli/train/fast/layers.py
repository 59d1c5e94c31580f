"""Decoder layers that run on the fused functions, put in place of transformers' own forward.

Llama's layout (Llama, Mistral, Phi-3, Qwen2, Qwen3): two RMS norms, rotary positions, grouped
queries, a gated MLP with SiLU; with LoRA on any of its linears, or bottleneck adapters after the
projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.train.attention import borders_of, causal, rows_apart
from peftcli.train.fast.again import run_checkpointed
from peftcli.train.fast.blocks import GatedMlp, Heads, Output, QueryKeyValue
from peftcli.train.fast.bottleneck import AddBottleneck, Bottleneck, fits, read_bottleneck
from peftcli.train.fast.linear import Norm
from peftcli.train.fast.lora import Group, Shadows, Unsupported, check
from peftcli.train.fast.offload import Offloading


@dataclass(frozen=True)
class FastLayer:
    """What one decoder layer needs to run fast."""

    layer: Any
    heads: Heads
    scale: float
    window: int | None
    out: Group
    out_adapter: Bottleneck | None
    mlp_norm: Norm
    gate_up: Group
    down: Group
    down_adapter: Bottleneck | None
    lean: bool
    """Whether memory counts more than the last percent of speed, as with checkpointing."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int = 0,
        **_: Any,
    ) -> Tensor:
        """What transformers calls in place of the layer's own forward: (rows x tokens x hidden)."""
        rows, tokens, hidden = hidden_states.shape
        x = hidden_states.reshape(rows * tokens, hidden)
        cos, sin = position_embeddings
        angles = cos.reshape(len(x), -1), sin.reshape(len(x), -1)
        mixed, x = self._mix(x, angles, rows, cu_seq_lens_q, max_length_q)
        x = self._mlp(self._output(mixed, x))
        return x.view(rows, tokens, hidden)

    def _mix(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        rows: int,
        borders: Tensor | None,
        longest: int,
    ) -> tuple[Tensor, Tensor]:
        """The attention's output, and the stream for what comes after it."""
        q, k, v, x = QueryKeyValue.apply(x, self.heads, *angles, *self.heads.group.parameters())
        tokens = len(x) // rows
        if borders is None and self.window is not None and self.window < tokens:
            borders, longest = borders_of(rows, tokens, x.device), tokens
        if borders is None:
            mixed = _full_rows(q, k, v, rows, self.scale)
        else:
            mixed = rows_apart(q, k, v, borders, longest, self.scale, self.window)
        return mixed.reshape(len(x), -1), x

    def _output(self, mixed: Tensor, x: Tensor) -> Tensor:
        adapter = self.out_adapter
        stream = x if adapter is None else None
        y: Tensor = Output.apply(mixed, stream, self.out, *self.out.parameters())
        return y if adapter is None else AddBottleneck.apply(y, x, adapter, *adapter.masters)

    def _mlp(self, x: Tensor) -> Tensor:
        adapter, groups = self.down_adapter, (self.gate_up, self.down)
        parameters = [p for group in groups for p in group.parameters()]
        y: Tensor = GatedMlp.apply(
            x, self.mlp_norm, *groups, adapter is None, self.lean, *parameters
        )
        return y if adapter is None else AddBottleneck.apply(y, x, adapter, *adapter.masters)


def install(
    layers: list[nn.Module],
    shadows: Shadows,
    checkpointing: bool,
    offload: bool = False,
    lowest: int | None = None,
) -> None:
    """Give every layer its fast forward; raises Unsupported, and changes nothing, if one cannot.

    With `offload`, the inputs that checkpointing keeps wait in host memory; with `lowest`, so many
    layers are checkpointed.
    """
    for layer in layers:
        check_layer(layer)
    offloading = Offloading(len(layers)) if offload else None
    for index, layer in enumerate(layers):
        run = run_checkpointed if offloading is None else offloading.runner(index, layer)
        fast = prepare(layer, shadows, lean=checkpointing)
        again = checkpointing and (lowest is None or index < lowest)
        _replace_forward(fast, run if again else None)


def check_layer(layer: Any) -> None:
    """Raise Unsupported where a decoder layer differs from Llama's layout."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(mlp, "base_layer") or hasattr(attention, "base_layer"):
        raise Unsupported("adapters around a whole block")
    if attention.config.hidden_act not in ("silu", "swish"):
        raise Unsupported(f"{attention.config.hidden_act} in the MLP")
    if attention.attention_dropout:
        raise Unsupported("attention dropout")
    if getattr(attention.config, "resid_pdrop", 0):
        raise Unsupported("dropout on the stream")
    check(_linears(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"))
    check(_linears(mlp, "gate_up_proj", "gate_proj", "up_proj"))
    for module in (attention.o_proj, mlp.down_proj):
        check([module.base_layer if fits(module) else module])
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in [*norms, getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)]:
        if norm is not None:
            read_norm(norm)


def prepare(layer: Any, shadows: Shadows, *, lean: bool = False) -> FastLayer:
    """The fast form of a decoder layer that `check_layer` found fit."""
    attention, mlp = layer.self_attn, layer.mlp
    query_norm = getattr(attention, "q_norm", None)
    key_norm = getattr(attention, "k_norm", None)
    keys = attention.config.num_key_value_heads * attention.head_dim
    heads = Heads(
        norm=read_norm(layer.input_layernorm),
        group=shadows.group(_linears(attention, "qkv_proj", "q_proj", "k_proj", "v_proj")),
        query_norm=None if query_norm is None else read_norm(query_norm),
        key_norm=None if key_norm is None else read_norm(key_norm),
        width=attention.head_dim,
        sizes=[attention.config.num_attention_heads * attention.head_dim, keys, keys],
    )
    return FastLayer(
        layer=layer,
        heads=heads,
        scale=attention.scaling,
        window=_window(attention),
        out=shadows.group([attention.o_proj]),
        out_adapter=read_bottleneck(attention.o_proj, shadows),
        mlp_norm=read_norm(layer.post_attention_layernorm),
        gate_up=shadows.group(_linears(mlp, "gate_up_proj", "gate_proj", "up_proj"), apart=lean),
        down=shadows.group([mlp.down_proj]),
        down_adapter=read_bottleneck(mlp.down_proj, shadows),
        lean=lean,
    )


def _linears(block: Any, joined: str, *apart: str) -> list[nn.Module]:
    """Linears of a block that read one input: one for all, as Phi-3 has them, or each its own."""
    if hasattr(block, joined):
        return [getattr(block, joined)]
    return [getattr(block, name) for name in apart]


def _full_rows(q: Tensor, k: Tensor, v: Tensor, rows: int, scale: float) -> Tensor:
    """Causal attention over equally long rows: (tokens x heads x width) in and out."""
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    return causal(q, k, v, scale).transpose(1, 2)


def _replace_forward(fast: FastLayer, checkpointed: Callable[..., Tensor] | None) -> None:
    def forward(_: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if checkpointed is not None and torch.is_grad_enabled():
            return checkpointed(fast.forward, hidden_states, **kwargs)
        return fast.forward(hidden_states, **kwargs)

    fast.layer.forward = MethodType(forward, fast.layer)


def read_norm(module: Any) -> Norm:
    """The weight and epsilon of an RMS norm; raises Unsupported where the weight is trained."""
    if module.weight.requires_grad:
        raise Unsupported("trained norms")
    return Norm(module.weight.detach(), module.variance_epsilon)


def _window(attention: Any) -> int | None:
    if attention.config.model_type in ("mistral", "phi3"):
        window: int | None = attention.config.sliding_window
        return window
    return getattr(attention, "sliding_window", None)
