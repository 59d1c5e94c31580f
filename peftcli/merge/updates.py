"""A base wrapped by PEFT on the meta device, and the adapter's tensors -> updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import ia3 as peft_ia3
from peft.tuners import lora as peft_lora
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from peftcli.errors import UsageError
from peftcli.merge import deltas
from peftcli.merge.deltas import Update

PREFIX = "base_model.model."
ADAPTER = "default"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Site:
    """One wrapped module: its name in the model, and the adapter's tensors under it."""

    name: str
    layer: Any
    take: Callable[[str], torch.Tensor]
    """Name below the module -> the tensor; each is taken once."""
    has: Callable[[str], bool]
    weight: float

    @property
    def parameter(self) -> str:
        """The module's name in the base, without PEFT's wrappers."""
        return self.name.replace(".base_layer", "").removesuffix(".token_adapter")

    @property
    def scale(self) -> float:
        """alpha / rank or its like, times the weight of the adapter."""
        return float(self.layer.scaling[ADAPTER]) * self.weight


def updates_of(
    wrapped: PeftModel, tensors: Tensors, weight: float
) -> tuple[dict[str, list[Update]], bool]:
    """Parameter -> updates, and whether token rows are shared with a tied output head.

    Raises UsageError for a kind of layer that is not merged here.
    """
    left = dict(tensors)
    found: dict[str, list[Update]] = defaultdict(list)
    tied_rows = False
    for name in [key for key in left if ".base_layer.bias" in key]:  # trained, then added to
        found[plain_name(name)].append(deltas.whole_value(left.pop(name)))
    for name, layer in wrapped.base_model.model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if isinstance(layer, TrainableTokensLayer) and layer.tied_adapter:
            tied_rows = True
            continue
        site = _site(name, layer, left, weight)
        for parameter, update in _kind(layer)(site):
            found[parameter].append(update)
    for name in list(left):
        found[plain_name(name)].append(deltas.whole_value(left.pop(name)))
    return dict(found), tied_rows


def _site(name: str, layer: Any, left: Tensors, weight: float) -> Site:
    prefix = f"{PREFIX}{name}."
    return Site(
        name, layer, lambda key: left.pop(prefix + key), lambda key: prefix + key in left, weight
    )


def plain_name(key: str) -> str:
    """The parameter of the base that a tensor in PEFT's naming stands for."""
    for wrapper in (".token_adapter.", ".base_layer.", ".original_module."):
        key = key.replace(wrapper, ".")
    return key.removeprefix(PREFIX)


def _trained(factor: torch.Tensor) -> bool:
    return bool(factor.abs().max() > 0)


def _linear(site: Site) -> list[tuple[str, Update]]:
    a, b = site.take("lora_A.weight"), site.take("lora_B.weight")
    transposed = bool(site.layer.fan_in_fan_out)
    found = []
    if site.has("lora_magnitude_vector"):
        magnitude = site.take("lora_magnitude_vector")
        update = deltas.dora(a, b, magnitude, site.scale, transposed=transposed)
        found.append((f"{site.parameter}.weight", update))
    elif _trained(b):  # untrained, for instance in a part of the model that text does not reach
        update = deltas.lora(a, b, site.scale, transposed=transposed)
        found.append((f"{site.parameter}.weight", update))
    if site.has("lora_B.bias"):
        bias = deltas.lora_bias(site.take("lora_B.bias"), site.scale)
        found.append((f"{site.parameter}.bias", bias))
    return found


def _embedding(site: Site) -> list[tuple[str, Update]]:
    a, b = site.take("lora_embedding_A"), site.take("lora_embedding_B")
    if site.has("lora_magnitude_vector"):
        magnitude = site.take("lora_magnitude_vector")
        update = deltas.dora_embedding(a, b, magnitude, site.scale)
    elif _trained(a):  # an embedding's A starts at zero
        update = deltas.lora_embedding(a, b, site.scale)
    else:
        return []
    return [(f"{site.parameter}.weight", update)]


def _parameter(site: Site) -> list[tuple[str, Update]]:
    a, b = site.take("lora_A.weight"), site.take("lora_B.weight")
    layer = site.layer
    name = f"{site.parameter}.{layer.parameter_name}"
    if not _trained(b):
        return []
    if layer.num_experts == 1:
        return [(name, deltas.lora(a, b, site.scale, transposed=False))]
    update = deltas.lora_experts(
        a,
        b,
        site.scale,
        experts=layer.num_experts,
        inputs_first=not layer._did_swap_in_out_features,
    )
    return [(name, update)]


def _ia3(site: Site) -> list[tuple[str, Update]]:
    factors = site.take("ia3_l")
    layer = site.layer
    on_inputs = bool(layer.is_feedforward)
    update = deltas.ia3(factors, on_inputs=on_inputs, transposed=bool(layer.fan_in_fan_out))
    found = [(f"{site.parameter}.weight", update)]
    if not on_inputs and layer.get_base_layer().bias is not None:
        bias = deltas.ia3(factors, on_inputs=False, transposed=False)
        found.append((f"{site.parameter}.bias", bias))
    return found


def _tokens(site: Site) -> list[tuple[str, Update]]:
    rows = site.take("trainable_tokens_delta")
    tokens = [int(token) for token in site.layer.token_indices[ADAPTER]]
    return [(f"{site.parameter}.weight", deltas.token_rows(rows, tokens))]


KINDS: dict[type, Callable[[Site], list[tuple[str, Update]]]] = {
    peft_lora.Linear: _linear,
    peft_lora.Embedding: _embedding,
    ParamWrapper: _parameter,
    peft_ia3.Linear: _ia3,
    TrainableTokensLayer: _tokens,
}


def _kind(layer: BaseTunerLayer) -> Callable[[Site], list[tuple[str, Update]]]:
    if type(layer) not in KINDS:
        raise UsageError(
            f"the adapter changes a {type(layer.get_base_layer()).__name__}, which is not merged "
            "here",
            "merge it with PEFT's merge_and_unload",
        )
    return KINDS[type(layer)]
