"""Linear layers that share an input, with their LoRA factors in the dtype of the computation.

PEFT's parameters stay the float32 masters that the optimizer steps. `Shadows` holds their 16-bit
copies, refreshed once a step; A matrices of a group lie side by side so that one product serves
them all, and B matrices carry the scale alpha / rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftcli.train.fast.weights import FrozenWeight

ADAPTER = "default"


@dataclass(frozen=True)
class LowRank:
    """One module's factors: masters, their copies, and its columns in the group's product."""

    a: Tensor
    b: Tensor
    scale: float
    shadow_b: Tensor
    """(out x rank), times the scale."""
    columns: slice


@dataclass(frozen=True)
class Group:
    """Frozen linear layers that read one input."""

    weights: list[FrozenWeight]
    biases: list[Tensor | None]
    factors: list[LowRank | None]
    shadow_a: Tensor | None
    """(sum of ranks x in); None where no layer of the group has an adapter."""

    def parameters(self) -> list[Tensor | None]:
        """A and B of each layer, as autograd sees them."""
        found: list[Tensor | None] = []
        for factor in self.factors:
            found += [None, None] if factor is None else [factor.a, factor.b]
        return found


@dataclass
class Shadows:
    """Copies of the trained factors in the dtype of the computation."""

    masters: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    scaled: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the optimizer did."""
        if not self.masters:
            return
        torch._foreach_copy_(self.copies, self.masters)
        if any(scale != 1 for scale in self.scales):
            torch._foreach_mul_(self.scaled, self.scales)

    def group(self, layers: list[nn.Module]) -> Group:
        """A group of plain or LoRA linears; raises Unsupported for what the fast step leaves out."""
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        weights = [FrozenWeight(base) for base in bases]
        pairs = [_pair(layer) for layer in layers]
        ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
        first = weights[0]
        device, dtype = bases[0].weight.device, first.dtype
        shadow_a = torch.empty(sum(ranks), first.shape[1], dtype=dtype, device=device)
        factors: list[LowRank | None] = []
        start = 0
        for pair, rank in zip(pairs, ranks, strict=True):
            if pair is None:
                factors.append(None)
                continue
            a, b, scale = pair
            columns = slice(start, start + rank)
            shadow_b = torch.empty(b.shape, dtype=dtype, device=device)
            self.masters += [a, b]
            self.copies += [shadow_a[columns], shadow_b]
            self.scaled.append(shadow_b)
            self.scales.append(scale)
            factors.append(LowRank(a, b, scale, shadow_b, columns))
            start += rank
        biases = [getattr(base, "bias", None) for base in bases]
        return Group(weights, biases, factors, shadow_a if start else None)


class Unsupported(Exception):
    """Why a layer keeps its plain forward pass."""


def _pair(layer: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """A, B and scale of a LoRA layer; None for a plain frozen linear."""
    base = getattr(layer, "base_layer", layer)
    if not isinstance(base, nn.Linear):
        raise Unsupported(f"{type(base).__name__} layers")
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        raise Unsupported("trained weights or biases of the base")
    if base is layer:
        return None
    if not hasattr(layer, "lora_A"):
        raise Unsupported(f"{type(layer).__name__} layers")
    if list(layer.lora_A) != [ADAPTER] or layer.active_adapters != [ADAPTER]:
        raise Unsupported("several adapters")
    if layer.lora_variant or layer.lora_bias.get(ADAPTER):
        raise Unsupported("DoRA and other variants of LoRA")
    if not isinstance(layer.lora_dropout[ADAPTER], nn.Identity):
        raise Unsupported("dropout")
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return a, b, float(layer.scaling[ADAPTER])
