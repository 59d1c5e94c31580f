"""Linear layers that share an input, with their LoRA factors in the dtype of the computation.

PEFT's parameters stay the float32 masters that the optimizer steps. `Shadows` keeps their copies,
refreshed once a step: A matrices of a group lie one below the other, B matrices lie, times
alpha / rank, beside the frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.train.fast.four_bit import Apart, Quantized
from peftcli.train.fast.weights import Resident, Weights

ADAPTER = "default"
ALIGNMENT = 8  # columns: matrix units want rows that begin at multiples of 16 bytes


class Unsupported(Exception):
    """Why a layer keeps its plain forward pass."""


@dataclass(frozen=True)
class Factors:
    """One layer's A and B, and their block of the group's update."""

    a: Tensor
    b: Tensor
    scale: float
    rows: slice
    """Its outputs."""
    columns: slice
    """Its ranks."""


@dataclass(frozen=True)
class Group:
    """Frozen linear layers that read one input."""

    weights: Weights
    bias: Tensor | None
    sizes: list[int]
    """Outputs of each layer."""
    factors: list[Factors | None]
    columns: int
    """Sum of the ranks, rounded up; 0 where no layer of the group has an adapter."""

    def held(self) -> Group:
        """The same, ready for several products in a row."""
        return replace(self, weights=self.weights.held())

    def parameters(self) -> list[Tensor | None]:
        """A and B of each layer, as autograd sees them."""
        found: list[Tensor | None] = []
        for factor in self.factors:
            found += [None, None] if factor is None else [factor.a, factor.b]
        return found


def weights_of(layers: list[Any], columns: int, apart: bool = False) -> Weights:
    """The weights of plain or 4-bit linears that share an input; `apart` is for the latter."""
    if is_four_bit(layers[0]):
        return Apart(layers, columns) if apart else Quantized(layers, columns)
    return Resident(layers, columns)


def is_four_bit(layer: nn.Module) -> bool:
    """Whether a linear holds its weights in 4 bits, as bitsandbytes does."""
    return isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state")


@dataclass
class Shadows:
    """Copies of the trained factors in the dtype of the computation."""

    hold: Callable[[list[Any], int, bool], Weights] = weights_of
    """Takes the frozen weights of a group over."""
    masters: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    _spread: Any = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the optimizer did."""
        if not self.masters:
            return
        if self._at_once():
            self._spread.copy()
            return
        torch._foreach_copy_(self.copies, self.masters)
        scaled = [(c, s) for c, s in zip(self.copies, self.scales, strict=True) if s != 1]
        if scaled:
            torch._foreach_mul_([copy for copy, _ in scaled], [scale for _, scale in scaled])

    def _at_once(self) -> bool:
        """Whether `_spread` can do it, which is made anew when the optimizer has moved masters."""
        if self._spread is not None and self._spread.of(self.masters):
            return True
        self._spread = None
        if self.masters[0].is_cuda:
            from peftcli.train.fast import triton_spread

            if triton_spread.fits(self.masters, self.copies):
                self._spread = triton_spread.Spread(self.masters, self.copies, self.scales)
        return self._spread is not None

    def copy(self, master: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A copy of one trained parameter; None of None."""
        if master is None:
            return None
        copy = torch.empty_like(master, dtype=dtype, requires_grad=False)
        self.masters.append(master)
        self.copies.append(copy)
        self.scales.append(1.0)
        return copy

    def group(self, layers: list[nn.Module], *, apart: bool = False) -> Group:
        """The group of plain or LoRA linears that `check` has found fit.

        With `apart`, 4-bit weights of its layers are never in 16 bits together.
        """
        bases: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers]
        pairs = [_pair(layer) for layer in layers]
        ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
        columns = -(-sum(ranks) // ALIGNMENT) * ALIGNMENT
        weights = self.hold(bases, columns, apart)
        sizes = [base.out_features for base in bases]
        factors: list[Factors | None] = []
        row = column = 0
        for pair, size, rank in zip(pairs, sizes, ranks, strict=True):
            if pair is None:
                factors.append(None)
            else:
                found = Factors(*pair, slice(row, row + size), slice(column, column + rank))
                self._follow(found, weights)
                factors.append(found)
            row, column = row + size, column + rank
        return Group(weights, _bias(bases), sizes, factors, columns)

    def _follow(self, factors: Factors, weights: Weights) -> None:
        block = weights.shadow_b[factors.rows, factors.columns]
        self.masters += [factors.a, factors.b]
        self.copies += [weights.shadow_a[factors.columns], block]
        self.scales += [1.0, factors.scale]


def check(layers: list[nn.Module]) -> None:
    """Raise Unsupported for what the fast step leaves out."""
    bases: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers]
    for layer, base in zip(layers, bases, strict=True):
        if not (type(base) is nn.Linear or is_four_bit(base)):  # others' weights are codes
            raise Unsupported(f"{type(base).__name__} layers")
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            raise Unsupported("trained weights or biases of the base")
        if base is not layer:
            _check_adapter(layer)
    if len({type(base) for base in bases}) > 1:
        raise Unsupported("groups of 4-bit and 16-bit layers")
    if is_four_bit(bases[0]):
        _check_expansion([base.weight.quant_state for base in bases])


def _check_expansion(states: list[Any]) -> None:
    """One launch expands a group, eight values of a row at a time."""
    if states[0].shape[1] % 8:
        raise Unsupported(f"4-bit layers of {states[0].shape[1]} inputs")
    if len({(state.nested, state.blocksize, state.dtype) for state in states}) > 1:
        raise Unsupported("groups of 4-bit layers of several kinds")


def _check_adapter(layer: Any) -> None:
    if not hasattr(layer, "lora_A"):
        raise Unsupported(f"{type(layer).__name__} layers")
    if list(layer.lora_A) != [ADAPTER] or layer.active_adapters != [ADAPTER]:
        raise Unsupported("several adapters")
    if layer.lora_variant or layer.lora_bias.get(ADAPTER):
        raise Unsupported("DoRA and other variants of LoRA")
    if not isinstance(layer.lora_dropout[ADAPTER], nn.Identity):
        raise Unsupported("dropout")


def _pair(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and scale of a LoRA layer; None for a plain frozen linear."""
    if not hasattr(layer, "lora_A"):
        return None
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return a, b, float(layer.scaling[ADAPTER])


def _bias(bases: list[Any]) -> Tensor | None:
    """The biases end to end, with zeros where a layer has none."""
    if all(base.bias is None for base in bases):
        return None
    some = next(base.bias for base in bases if base.bias is not None)
    parts = [
        some.new_zeros(base.out_features) if base.bias is None else base.bias.detach()
        for base in bases
    ]
    return torch.cat(parts)
