"""What every tuning method answers, so that no other file asks for a method's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

    from peftcli.architecture.config import Architecture, Linear

Quantization = Literal["nf4", "fp4"]
ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]
Names = Annotated[tuple[str, ...], Strict(False)]  # YAML has lists only
Indices = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False)]
Layers = Annotated[Indices, Field(min_length=1)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        defer_build=True,
    )


class Conflict(ValueError):
    """Keys of a section that cannot go together: (keys below the section, sentence) for each."""

    def __init__(self, found: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(text for _, text in found))
        self.found = found


def refuse_conflicts(found: list[tuple[tuple[str, ...], str]]) -> None:
    """Raise Conflict when anything was found."""
    if found:
        raise Conflict(found)


@dataclass(frozen=True, eq=False)
class Footprint:
    """What a method puts beside and inside a base, as far as memory and time depend on it."""

    trains_base: bool = False
    trains_head: bool = False
    trains_embeddings: bool = False
    """Whether any of their rows are trained, so that every layer runs backward."""
    targets: tuple[Linear, ...] = ()
    """Linear modules with a low-rank update."""
    rank: int = 0
    ranks: tuple[tuple[str, int], ...] = ()
    """Names of targets that have another rank, and that."""
    bottleneck: int = 0
    """Width of bottleneck adapters."""
    sites: int = 0
    """Bottleneck adapters in each layer."""
    layers: tuple[int, ...] | None = None
    """Layers with bottleneck adapters; None for all of them."""
    dropout: bool = False
    magnitudes: bool = False
    """Whether the length of each row of a weight is trained too (DoRA)."""
    quantization: Quantization | Literal["fp8"] | None = None
    double_quantization: bool = True
    fusible: bool = False
    """Whether the fused functions know all that it changes (peftcli/train/fast)."""


@dataclass(frozen=True, eq=False)
class Thrift:
    """A change of the recipe's `method` section that needs less memory."""

    keys: dict[str, Any]
    """Keys below `method` and their new values; with `name`, keys that the other has stay."""
    consequence: str


class Method(Section):
    """A way of tuning; each subclass is one entry of the recipe's `method.name`."""

    summary: ClassVar[str]
    default_learning_rate: ClassVar[float]
    usual_learning_rates: ClassVar[tuple[float, float]]
    """Lowest and highest rate that published runs used; outside it the recipe gets a warning."""
    default_optimizer: ClassVar[str] = "adamw_torch_fused"
    mergeable: ClassVar[bool] = True
    saves_adapter: ClassVar[bool] = True
    exact_start: ClassVar[bool] = True
    """Whether the untrained method leaves the base's logits unchanged bit for bit."""

    def optimizer(self) -> str:
        """The optimizer to use when the recipe names none."""
        return self.default_optimizer

    def peft_config(self, architecture: Architecture) -> PeftConfig | None:
        """The configuration PEFT wraps the base with; None tunes the base itself."""
        raise NotImplementedError

    def quantization_config(self, dtype: str) -> BitsAndBytesConfig | None:
        """How the frozen base is quantised at load; `dtype` is the dtype the run computes in."""
        return None

    @property
    def frozen_in_fp8(self) -> bool:
        """Whether the fused layers hold the base in fp8; plain layers cannot."""
        return False

    @property
    def initializes_from_data(self) -> bool:
        """Whether the untrained adapter takes its start from the training rows (EVA)."""
        return False

    @property
    def few_bits(self) -> bool:
        """Whether the run computes with a base that is rounded to 4 or 8 bits."""
        return self.frozen_in_fp8

    def weights_dtype(self, dtype: str) -> str:
        """The dtype the base's weights are held in, where the run computes in `dtype`."""
        return dtype

    def trainable_parameters(self, architecture: Architecture) -> int:
        """The exact number of trained values, without building the model."""
        raise NotImplementedError

    def footprint(self, architecture: Architecture) -> Footprint:
        """What memory and time depend on, without building the model."""
        raise NotImplementedError

    def thriftier(self) -> list[Thrift]:
        """Changes of this method that need less memory, the least costly first."""
        return []

    def problems(self, architecture: Architecture) -> list[tuple[tuple[str, ...], str]]:
        """What cannot work on this architecture, each as (keys below `method`, sentence)."""
        return []

    def learning_rate_multipliers(self) -> dict[str, float]:
        """Factors on the learning rate of parameters whose name contains the key (LoRA+)."""
        return {}


def whole_parameters(
    architecture: Architecture, modules: tuple[str, ...], tokens: tuple[int, ...]
) -> int:
    """Values trained whole: `modules_to_save`, and the embedding rows of single tokens."""
    linears = [x for x in architecture.linears if x.suffix in modules]
    tensors = [x for x in architecture.tensors if set(modules) & set(x.name.split("."))]
    whole = sum(x.parameters() for x in linears) + sum(x.parameters() for x in tensors)
    return whole + len(tokens) * architecture.hidden_size


def trains_embeddings(
    architecture: Architecture, modules: tuple[str, ...], tokens: tuple[int, ...]
) -> bool:
    """Whether whole embeddings are trained, or the rows of single tokens."""
    places = (
        "embed" in name and any(part in name.split(".") for part in modules)
        for name in (x.name for x in architecture.tensors if not x.layers)
    )
    return bool(tokens) or any(places)


def layer_problem(
    architecture: Architecture, layers: tuple[int, ...]
) -> tuple[tuple[str, ...], str] | None:
    """What is wrong with a subset of layers on this architecture."""
    if max(layers) < architecture.layers:
        return None
    last = architecture.layers - 1
    return ("layers",), f"names layer {max(layers)}; this model has layers 0 to {last}"


def tokens_problem(
    architecture: Architecture, tokens: tuple[int, ...]
) -> tuple[tuple[str, ...], str] | None:
    """Why single embedding rows cannot be trained on this architecture."""
    key = ("trainable_token_indices",)
    if tokens and max(tokens) >= architecture.vocab_size:
        return key, f"names token {max(tokens)}; this model has {architecture.vocab_size} tokens"
    if tokens and architecture.tied_embeddings:
        return key, "does not work where the output head shares the embeddings; remove it"
    return None


class QuantizedBase(Section):
    """Keys of methods that can freeze the base in 4 bits."""

    double_quantization: bool = True
    """Quantise the quantisation constants too; saves about 0.37 bits per weight."""
    compute_dtype: ComputeDtype = "auto"
    """The dtype 4-bit weights are expanded to; `auto` is the dtype of the run."""


def bitsandbytes_config(
    kind: Quantization, options: QuantizedBase, dtype: str
) -> BitsAndBytesConfig:
    """The 4-bit configuration of Dettmers et al., 2023 (QLoRA), arXiv 2305.14314."""
    import torch
    from transformers import BitsAndBytesConfig

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    compute = dtype if options.compute_dtype == "auto" else options.compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=options.double_quantization,
        bnb_4bit_compute_dtype=dtypes[compute],
    )
