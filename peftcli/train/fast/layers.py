"""Decoder layers that run on the fused functions, put in place of transformers' own forward.

Llama's layout (Llama, Mistral, Qwen2, Qwen3): two RMS norms, rotary positions, grouped queries, a
gated MLP with SiLU. A sub-layer whose modules are not plain or LoRA linears, such as one that a
bottleneck adapter wraps, calls those modules as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from peftcli.train.attention import borders_of, rows_apart
from peftcli.train.fast import ops
from peftcli.train.fast.linear import GatedMlp, Norm, NormRows, Project
from peftcli.train.fast.lora import Group, Shadows, Unsupported

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}


@dataclass(frozen=True)
class FastLayer:
    """What one decoder layer needs to run fast."""

    layer: nn.Module
    heads: int
    key_heads: int
    width: int
    scale: float
    window: int | None
    norm: Norm
    mlp_norm: Norm
    qkv: Group
    query_norm: Norm | None
    key_norm: Norm | None
    out: Group | None
    """None where the output projection is called as a module."""
    wide: Group
    down: Group | None

    def attention(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cu: Tensor | None, longest: int
    ) -> Tensor:
        """(rows x tokens x hidden) -> the same, with the layer's input added."""
        rows, tokens, hidden = x.shape
        flat = x.reshape(rows * tokens, hidden)
        q, k, v = Project.apply(flat, self.qkv, self.norm, *self.qkv.parameters())
        q, k = q.view(-1, self.heads, self.width), k.view(-1, self.key_heads, self.width)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = NormRows.apply(q, self.query_norm), NormRows.apply(k, self.key_norm)
        q, k = Rope.apply(q, k, *angles)
        v = v.view(-1, self.key_heads, self.width)
        if cu is None and self.window is not None and self.window < tokens:
            cu, longest = borders_of(rows, tokens, x.device), tokens
        if cu is not None:
            mixed = rows_apart(q, k, v, cu, longest, self.scale, self.window)
        else:
            mixed = _full_rows(q, k, v, rows, self.scale)
        mixed = mixed.reshape(rows * tokens, -1)
        if self.out is None:
            return x + self.layer.self_attn.o_proj(mixed.view(rows, tokens, -1))
        (y,) = Project.apply(mixed, self.out, None, *self.out.parameters())
        return x + y.view(x.shape)

    def mlp(self, x: Tensor) -> Tensor:
        """(rows x tokens x hidden) -> the same, with the input added."""
        flat = x.reshape(-1, x.shape[-1])
        down = [] if self.down is None else self.down.parameters()
        parameters = (*self.wide.parameters(), *down)
        y = GatedMlp.apply(flat, self.mlp_norm, self.wide, self.down, *parameters)
        if self.down is None:
            return x + self.layer.mlp.down_proj(y.view(*x.shape[:-1], -1))
        return y.view(x.shape)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int = 0,
        **_: Any,
    ) -> Tensor:
        """What transformers calls in place of the layer's own forward."""
        angles = flat_angles(position_embeddings, hidden_states.shape[0])
        x = self.attention(hidden_states, angles, cu_seq_lens_q, max_length_q)
        return self.mlp(x)


class Rope(torch.autograd.Function):
    """Rotary positions, in place: (tokens x heads x width) queries and keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        # In place without telling autograd: nothing keeps what the projections gave.
        return ops.rope_(q.detach(), cos, sin), ops.rope_(k.detach(), cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        dq, dk = dq.contiguous(), dk.contiguous()  # fresh from attention: nobody else reads them
        return ops.rope_(dq, cos, sin, -1), ops.rope_(dk, cos, sin, -1), None, None


def install(layers: list[nn.Module], shadows: Shadows) -> None:
    """Give every layer its fast forward; raises Unsupported, and changes nothing, if one cannot."""
    for fast in [prepare(layer, shadows) for layer in layers]:
        _replace_forward(fast)


def prepare(layer: nn.Module, shadows: Shadows) -> FastLayer:
    """Read a decoder layer of Llama's layout; raises Unsupported where it differs."""
    attention, mlp = layer.self_attn, layer.mlp
    if _wrapped(mlp) or _wrapped(attention):
        raise Unsupported("adapters around a whole block")
    if attention.config.hidden_act not in ("silu", "swish"):
        raise Unsupported(f"{attention.config.hidden_act} in the MLP")
    if attention.attention_dropout:
        raise Unsupported("attention dropout")
    config = attention.config
    width = attention.head_dim
    query_norm = getattr(attention, "q_norm", None)
    key_norm = getattr(attention, "k_norm", None)
    return FastLayer(
        layer=layer,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        width=width,
        scale=attention.scaling,
        window=_window(attention),
        norm=read_norm(layer.input_layernorm),
        mlp_norm=read_norm(layer.post_attention_layernorm),
        qkv=shadows.group([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=None if query_norm is None else read_norm(query_norm),
        key_norm=None if key_norm is None else read_norm(key_norm),
        out=None if _wrapped(attention.o_proj) else shadows.group([attention.o_proj]),
        wide=shadows.group([mlp.gate_proj, mlp.up_proj]),
        down=None if _wrapped(mlp.down_proj) else shadows.group([mlp.down_proj]),
    )


def flat_angles(embeddings: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """cos and sin as (rows * tokens x width), from (rows or 1 x tokens x width)."""
    cos, sin = embeddings
    if cos.shape[0] != rows:
        cos, sin = cos.expand(rows, -1, -1), sin.expand(rows, -1, -1)
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])


def _full_rows(q: Tensor, k: Tensor, v: Tensor, rows: int, scale: float) -> Tensor:
    """Causal attention over equally long rows: (tokens x heads x width) in and out."""
    states = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(
        *states, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _replace_forward(fast: FastLayer) -> None:
    def forward(_: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return fast.forward(hidden_states, **kwargs)

    fast.layer.forward = MethodType(forward, fast.layer)  # type: ignore[method-assign]


def read_norm(module: nn.Module) -> Norm:
    """The weight and epsilon of an RMS norm; raises Unsupported where the weight is trained."""
    if module.weight.requires_grad:
        raise Unsupported("trained norms")
    return Norm(module.weight.detach(), module.variance_epsilon)


def _wrapped(module: nn.Module) -> bool:
    """Whether something other than LoRA sits around a linear."""
    return hasattr(module, "base_layer") and not hasattr(module, "lora_A")


def _window(attention: nn.Module) -> int | None:
    if attention.config.model_type == "mistral":
        window: int | None = attention.config.sliding_window
        return window
    return getattr(attention, "sliding_window", None)
