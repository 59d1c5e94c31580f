"""Bottleneck adapters: small two-layer networks after the sub-layers of a frozen base.

Houlsby et al., 2019, arXiv 1902.00751; Pfeiffer et al., 2021, arXiv 2005.00247; parallel: He et
al., 2022, arXiv 2110.04366.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from peftcli.architecture.families import family_of
from peftcli.methods.base import (
    Footprint,
    Indices,
    Layers,
    Method,
    Names,
    Quantization,
    QuantizedBase,
    Thrift,
    bitsandbytes_config,
    layer_problem,
    refuse_conflicts,
    tokens_problem,
    trains_embeddings,
    whole_parameters,
)

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from peftcli.architecture.config import Architecture
    from peftcli.methods.bottleneck_tuner import BottleneckConfig


class Adapter(Method, QuantizedBase):
    """Bottleneck adapters on a 16-bit or 4-bit base; non-linear, so never merged."""

    summary: ClassVar[str] = "bottleneck networks after attention and FFN; cannot be merged"
    default_learning_rate: ClassVar[float] = 1e-4
    usual_learning_rates: ClassVar[tuple[float, float]] = (1e-5, 2e-3)
    mergeable: ClassVar[bool] = False

    name: Literal["adapter"] = "adapter"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """houlsby: after attention and FFN; pfeiffer: after the FFN; parallel: beside the FFN."""
    bottleneck_size: int | None = Field(None, ge=1)
    """Width of the bottleneck; 64 when reduction_factor is absent too."""
    reduction_factor: float | None = Field(None, gt=0)
    """Width of the bottleneck as hidden size / reduction_factor."""
    non_linearity: Literal["relu", "gelu", "silu"] = "relu"
    """The function inside the bottleneck."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the bottleneck."""
    bias: bool = True
    """Whether both projections of the bottleneck have biases."""
    scaling: float = Field(1.0, gt=0)
    """Factor on the adapter's output; 4 is usual for `parallel`."""
    layers: Layers | None = None
    """Indices of the layers to tune; all of them when absent."""
    modules_to_save: Names = ()
    """Modules trained whole and saved beside the adapter, such as `lm_head`."""
    trainable_token_indices: Indices = ()
    """Token ids whose embedding rows are trained."""
    quantization: Quantization | None = None
    """`nf4` or `fp4` freezes the base in 4 bits; absent keeps it in 16 bits."""

    @model_validator(mode="after")
    def _one_size(self) -> Adapter:
        found: list[tuple[tuple[str, ...], str]] = []
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            text = "`bottleneck_size` and `reduction_factor` exclude each other; keep one"
            found.append((("reduction_factor",), text))
        if self.quantization is None and self.compute_dtype != "auto":
            text = "belongs to a 4-bit base; write `quantization: nf4` too, or remove it"
            found.append((("compute_dtype",), text))
        if self.quantization is None and not self.double_quantization:
            text = "belongs to a 4-bit base; write `quantization: nf4` too, or remove it"
            found.append((("double_quantization",), text))
        refuse_conflicts(found)
        return self

    def optimizer(self) -> str:
        return "adamw_torch_fused" if self.quantization is None else "paged_adamw_32bit"

    @property
    def few_bits(self) -> bool:
        return self.quantization is not None

    def quantization_config(self, dtype: str) -> BitsAndBytesConfig | None:
        if self.quantization is None:
            return None
        return bitsandbytes_config(self.quantization, self, dtype)

    def size(self, hidden_size: int) -> int:
        """The width of the bottleneck on a layer of this width."""
        if self.reduction_factor is not None:
            return max(1, round(hidden_size / self.reduction_factor))
        return self.bottleneck_size or 64

    def trainable_parameters(self, architecture: Architecture) -> int:
        family = family_of(architecture.model_type)
        sites = family.adapter_sites(self.placement) if family else ()
        layers = len(self.layers) if self.layers is not None else architecture.layers
        width, size = architecture.hidden_size, self.size(architecture.hidden_size)
        each = 2 * width * size + (width + size if self.bias else 0)
        return layers * len(sites) * each + whole_parameters(
            architecture, self.modules_to_save, self.trainable_token_indices
        )

    def footprint(self, architecture: Architecture) -> Footprint:
        family = family_of(architecture.model_type)
        return Footprint(
            trains_head="lm_head" in self.modules_to_save,
            trains_embeddings=trains_embeddings(
                architecture, self.modules_to_save, self.trainable_token_indices
            ),
            bottleneck=self.size(architecture.hidden_size),
            sites=len(family.adapter_sites(self.placement)) if family else 0,
            layers=self.layers,
            dropout=self.dropout > 0,
            fusible=self._fusible(),
            quantization=self.quantization,
            double_quantization=self.double_quantization,
        )

    def _fusible(self) -> bool:
        others = self.dropout > 0 or self.placement == "parallel"
        return not others and set(self.modules_to_save) <= {"embed_tokens"}

    def thriftier(self) -> list[Thrift]:
        if self.quantization is not None:
            return []
        text = "the base in 4 bits: slightly less exact, a little slower"
        return [Thrift({"quantization": "nf4"}, text)]

    def problems(self, architecture: Architecture) -> list[tuple[tuple[str, ...], str]]:
        family = family_of(architecture.model_type)
        if family is None:
            text = f"{architecture.model_type} models are not known to it yet; use `lora`"
            return [(("name",), text)]
        if not family.adapter_sites(self.placement):
            return [(("placement",), f"{self.placement} has no place in this model; use houlsby")]
        found = [layer_problem(architecture, self.layers)] if self.layers else []
        found.append(tokens_problem(architecture, self.trainable_token_indices))
        return [problem for problem in found if problem is not None]

    def peft_config(self, architecture: Architecture) -> BottleneckConfig:
        from peftcli.methods.bottleneck_tuner import BottleneckConfig

        size = self.bottleneck_size if self.reduction_factor is not None else self.size(0)
        return BottleneckConfig(
            task_type="CAUSAL_LM",
            bottleneck_size=size,
            reduction_factor=self.reduction_factor,
            non_linearity=self.non_linearity,
            dropout=self.dropout,
            use_bias=self.bias,
            placement=self.placement,
            scaling=self.scaling,
            layers_to_transform=None if self.layers is None else list(self.layers),
            modules_to_save=list(self.modules_to_save) or None,
            trainable_token_indices=list(self.trainable_token_indices) or None,
        )
