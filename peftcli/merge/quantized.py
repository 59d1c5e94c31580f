"""The base as a run saw it that held it in few bits: quantised and expanded again, where it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from bitsandbytes.nn import Linear4bit
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer

from peftcli import fp8
from peftcli.errors import ArtefactError
from peftcli.merge.blocks import round_parts
from peftcli.merge.skeleton import skeleton
from peftcli.merge.source import AdapterSource
from peftcli.models import DTYPES

PART = 1 << 18  # values of a whole tensor that are rounded at once; a multiple of the block


class Quantization(Protocol):
    """How a run held its base."""

    @property
    def kind(self) -> str:
        """nf4, fp4 or fp8."""

    @property
    def bits(self) -> str:
        """4-bit or fp8, as an adjective."""

    def round_trip(self, weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """The weight after quantising and expanding, as the run multiplied with it."""

    def round_parts(self, parts: Iterable[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
        """The same for the weight's rows in order, `count` values in all; it is never held whole.

        Each part but the last has whole blocks, and may lie in memory that the next one takes.
        """

    def parameters(self, config: PreTrainedConfig) -> dict[str, bool]:
        """The weights that were quantised, and whether each is stored transposed (Conv1D)."""

    def load(self, folder: Path, device: torch.device, *, pickle: bool) -> PreTrainedModel:
        """The base as the run computed with it, in float32."""


@dataclass(frozen=True)
class FourBits:
    """A base that bitsandbytes held in 4 bits."""

    config: BitsAndBytesConfig
    dtype: torch.dtype
    """What the base was loaded in, and what 4-bit weights expand to."""

    @property
    def kind(self) -> str:
        """nf4 or fp4."""
        return str(self.config.bnb_4bit_quant_type)

    @property
    def bits(self) -> str:
        return "4-bit"

    def round_trip(self, weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """The weight after quantising and expanding, in the dtype the run expanded it to.

        In parts, because bitsandbytes takes many times the memory of what it is given.
        """
        values = (weight.T if transposed else weight).to(self.dtype).contiguous()
        expanded = torch.empty_like(values)
        targets = torch.split(expanded.view(-1), PART)
        rounded = self.round_parts(torch.split(values.view(-1), PART), values.numel())
        for target, part in zip(targets, rounded, strict=True):
            target.copy_(part)
        return expanded.T.contiguous() if transposed else expanded

    def round_parts(self, parts: Iterable[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
        """In the dtype the run expanded the weight to."""
        double = bool(self.config.bnb_4bit_use_double_quant)
        values = (part.to(self.dtype) for part in parts)
        return round_parts(values, count, self.kind, double=double)

    def parameters(self, config: PreTrainedConfig) -> dict[str, bool]:
        """transformers' own rule decides, on the model without weights.

        It takes linear modules, except the output head and what the configuration skips.
        """
        model = skeleton(config, None)
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(self.config), pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None)
        return {
            f"{name}.weight": module.source_cls.__name__ == "Conv1D"
            for name, module in model.named_modules()
            if isinstance(module, Linear4bit)
        }

    def load(self, folder: Path, device: torch.device, *, pickle: bool) -> PreTrainedModel:
        """By bitsandbytes itself, and expanded."""
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=self.dtype,
            quantization_config=self.config,
            device_map={"": device},
            use_safetensors=not pickle,
            trust_remote_code=False,
        )
        expanded: PreTrainedModel = base.dequantize().float()
        return expanded


@dataclass(frozen=True)
class EightBits:
    """A base that the fused layers held in fp8."""

    dtype: torch.dtype
    """What the base was loaded in."""

    @property
    def kind(self) -> str:
        return "fp8"

    @property
    def bits(self) -> str:
        return "fp8"

    def round_trip(self, weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """Codes times scales in float32; no fused layer has transposed weights."""
        return fp8.round_trip(weight.to(self.dtype))

    def round_parts(self, parts: Iterable[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
        """Each row has its own scale."""
        for part in parts:
            yield fp8.round_trip(part.to(self.dtype))

    def parameters(self, config: PreTrainedConfig) -> dict[str, bool]:
        """The linears of the decoder layers."""
        model = skeleton(config, None)
        return {f"{name}.weight": False for name, _ in fp8.frozen_linears(model)}

    def load(self, folder: Path, device: torch.device, *, pickle: bool) -> PreTrainedModel:
        """Loaded as the run did, and rounded in float32."""
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=self.dtype,
            device_map={"": device},
            use_safetensors=not pickle,
            trust_remote_code=False,
        )
        base = base.float()
        fp8.round_base(base)
        return base


def quantization_of(source: AdapterSource) -> Quantization | None:
    """How the run that made this adapter held its base; None when in 16 bits, or unknown."""
    recipe = source.recipe()
    if recipe is None or source.manifest is None:
        return None
    dtype = str(source.manifest.get("device", {}).get("dtype"))
    if dtype not in DTYPES:
        raise ArtefactError(
            f"{source.name}: run.json does not say in which dtype it ran",
            "restore run.json, or merge the adapter folder from another place with --base-model",
        )
    loaded = DTYPES[recipe.method.weights_dtype(dtype)]
    if recipe.method.frozen_in_fp8:
        return EightBits(loaded)
    config = recipe.method.quantization_config(dtype)
    if config is None:
        return None
    return FourBits(config, loaded)


def assumed_quantization() -> Quantization:
    """What nearly every QLoRA run uses, for adapters that come without run.json."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return FourBits(config, torch.bfloat16)
