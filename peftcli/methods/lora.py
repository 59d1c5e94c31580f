"""LoRA: train two low-rank factors beside each frozen linear layer, of 16 bits or in fp8.

Hu et al., 2021, arXiv 2106.09685. The keys are in low_rank.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import field_validator, model_validator

from peftcli.methods.base import Footprint, Thrift, refuse_conflicts
from peftcli.methods.low_rank import LowRank

if TYPE_CHECKING:
    from peftcli.architecture.config import Architecture


class Lora(LowRank):
    """LoRA on a 16-bit base, or on one in fp8."""

    summary: ClassVar[str] = "two low-rank factors beside each linear layer of a 16-bit base"
    name: Literal["lora"] = "lora"
    quantization: Literal["fp8"] | None = None
    """`fp8` freezes the base in 8 bits: faster and smaller, on cards that multiply in fp8."""

    @field_validator("quantization", mode="before")
    @classmethod
    def _not_four_bits(cls, value: object) -> object:
        if value in ("nf4", "fp4"):
            raise ValueError(f"{value} belongs to `name: qlora`; lora takes `fp8`, or none at all")
        return value

    @property
    def frozen_in_fp8(self) -> bool:
        return self.quantization == "fp8"

    @model_validator(mode="after")
    def _check_fp8(self) -> Lora:
        if not self.frozen_in_fp8:
            return self
        text = "does not work with `quantization: fp8`; remove one of them"
        targets = () if isinstance(self.target_modules, str) else self.target_modules
        clashes = {
            "use_dora": self.use_dora,
            "dropout": self.dropout > 0,
            "bias": self.bias != "none",
            "modules_to_save": "lm_head" in self.modules_to_save,
            "target_modules": "lm_head" in targets,
        }
        refuse_conflicts([((key,), text) for key, clash in clashes.items() if clash])
        return self

    def problems(self, architecture: Architecture) -> list[tuple[tuple[str, ...], str]]:
        found = super().problems(architecture)
        odd = [x for x in architecture.linears if x.inputs % 16 or x.outputs % 16]
        if self.frozen_in_fp8 and odd:
            size = f"{odd[0].suffix} has {odd[0].outputs} x {odd[0].inputs} weights"
            found.append((("quantization",), f"fp8 needs multiples of 16, and {size}; remove it"))
        return found

    def footprint(self, architecture: Architecture) -> Footprint:
        return replace(super().footprint(architecture), quantization=self.quantization)

    def thriftier(self) -> list[Thrift]:
        text = "the base in 4 bits: slightly less exact, a little slower"
        keys = {"name": "qlora"} | ({"quantization": "nf4"} if self.frozen_in_fp8 else {})
        return [Thrift(keys, text), *super().thriftier()]
