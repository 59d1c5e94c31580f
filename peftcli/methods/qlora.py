"""QLoRA: LoRA on a base frozen in 4 bits, with a paged optimizer.

Dettmers et al., 2023, arXiv 2305.14314.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from peftcli.methods.base import Footprint, Quantization, QuantizedBase, bitsandbytes_config
from peftcli.methods.low_rank import LowRank

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from peftcli.architecture.config import Architecture


class Qlora(LowRank, QuantizedBase):
    """LoRA on a 4-bit base."""

    summary: ClassVar[str] = "LoRA on a base frozen in 4 bits, with paged AdamW"
    default_optimizer: ClassVar[str] = "paged_adamw_32bit"

    name: Literal["qlora"] = "qlora"
    quantization: Quantization = "nf4"
    """The 4-bit number format of the frozen base; nf4 loses less on normal weights."""

    @property
    def few_bits(self) -> bool:
        return True

    def quantization_config(self, dtype: str) -> BitsAndBytesConfig:
        return bitsandbytes_config(self.quantization, self, dtype)

    def footprint(self, architecture: Architecture) -> Footprint:
        return replace(
            super().footprint(architecture),
            quantization=self.quantization,
            double_quantization=self.double_quantization,
        )
