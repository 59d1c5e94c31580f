"""What a decoder is made of: groups of equal linear modules, experts and other tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

Kind = Literal["attention", "mlp", "router", "head", "vision"]


@dataclass(frozen=True)
class Linear:
    """Equal linear modules; `name` holds `{}` in the place of the layer's index.

    `layers` is empty for a module that stands outside the layers. "attention" counts every token
    mixer, Mamba's projections included. `quantizable` says whether bitsandbytes converts it.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool
    layers: tuple[int, ...]
    kind: Kind
    quantizable: bool = True

    @property
    def count(self) -> int:
        return max(1, len(self.layers))

    @property
    def suffix(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def weights(self) -> int:
        """Elements of one module's weight matrix."""
        return self.inputs * self.outputs

    def parameters(self) -> int:
        """Elements of all modules of the group, biases included."""
        return self.count * (self.weights + self.outputs * self.bias)

    def paths(self) -> Iterator[tuple[str, int | None]]:
        """Full module path and layer index of each module."""
        if not self.layers:
            yield self.name, None
        for layer in self.layers:
            yield self.name.format(layer), layer


@dataclass(frozen=True)
class Experts:
    """A fused parameter of all experts of a layer: `count` times `shape` in each of `layers`.

    transformers 5 keeps experts so; neither PEFT's all-linear nor bitsandbytes touches them.
    `active` is the number of experts that one token passes.
    """

    name: str
    count: int
    active: int
    shape: tuple[int, ...]
    layers: tuple[int, ...]

    def parameters(self) -> int:
        return len(self.layers) * self.count * prod(self.shape)


@dataclass(frozen=True)
class Tensor:
    """Equal parameters that are no linear module: embeddings, norms and other small ones."""

    name: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] = ()
    kind: Literal["embedding", "norm", "other"] = "norm"

    def parameters(self) -> int:
        return max(1, len(self.layers)) * prod(self.shape)


HELD = ("gptq", "awq", "bitsandbytes", "fp8")


@dataclass(frozen=True)
class CheckpointQuantization:
    """How the checkpoint's weights are stored: gptq, awq, fp8, bitsandbytes, mxfp4, ..."""

    method: str
    bits: int | None
    group: int | None = None
    """Weights that share a scale, where the file says it."""
    double: bool = False
    """bitsandbytes: whether the scales are quantised too."""

    @property
    def held(self) -> bool:
        """Whether a loaded model keeps them so; others become 16-bit weights, or are not known."""
        return self.method in HELD and self.bits is not None


@dataclass(frozen=True)
class Architecture:
    """A decoder as its config.json describes it.

    `exact` is False where the family is not known and a plain gated decoder was assumed.
    `other_layers` is the key by which the file says that not all layers are attention, in a family
    that is not known: its memory cannot be told.
    `dtype` is the checkpoint's, None where the file does not say. `attention_softcap` forces the
    eager attention kernel. Layer indices of `linears` of kind "vision" count in their own tower.
    """

    model_type: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab_size: int
    tied_embeddings: bool
    max_positions: int | None
    dtype: str | None
    sliding_window: int | None
    attention_softcap: bool
    quantization: CheckpointQuantization | None
    linears: tuple[Linear, ...]
    experts: tuple[Experts, ...]
    tensors: tuple[Tensor, ...]
    exact: bool = True
    other_layers: str | None = None
    unfused_gelu: bool = False
    """Whether the activation is `gelu_new`: several operations, each of which keeps its input."""

    def __hash__(self) -> int:
        """From a few sizes, because estimates look up what they know of a model very often."""
        return hash((self.model_type, self.hidden_size, self.layers, self.intermediate))

    def parameters(self) -> int:
        """Elements of the whole model; tied weights count once."""
        return self._parameters

    @cached_property
    def _parameters(self) -> int:
        groups: tuple[Linear | Experts | Tensor, ...] = (
            *self.linears,
            *self.experts,
            *self.tensors,
        )
        total = sum(group.parameters() for group in groups)
        if self.tied_embeddings:
            total -= sum(linear.weights for linear in self.linears if linear.kind == "head")
        return total

    def active_parameters(self) -> int:
        """Parameters that one token passes: all but the experts it is not sent to."""
        idle = sum(e.parameters() // e.count * (e.count - e.active) for e in self.experts)
        return self.parameters() - idle

    def linear_names(self) -> list[str]:
        """Last parts of the linear modules' paths without the head: what a recipe targets."""
        return list(dict.fromkeys(x.suffix for x in self.linears if x.kind != "head"))
