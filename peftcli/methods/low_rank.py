"""What LoRA and QLoRA share: their keys, and the questions that these answer.

Hu et al., 2021, arXiv 2106.09685. rsLoRA: Kalajdzievski, 2023, arXiv 2312.03732. DoRA: Liu et al.,
2024, arXiv 2402.09353. LoRA+: Hayou et al., 2024, arXiv 2402.12354. EVA: Paischer et al., 2024,
arXiv 2410.07170.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from peftcli.architecture.families import family_of
from peftcli.methods.base import (
    Conflict,
    Footprint,
    Indices,
    Layers,
    Method,
    Names,
    Thrift,
    layer_problem,
    tokens_problem,
    trains_embeddings,
    whole_parameters,
)

if TYPE_CHECKING:
    from peft import LoraConfig

    from peftcli.architecture.config import Architecture, Linear

Targets = Literal["all-linear"] | str | Annotated[Names, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


class LowRank(Method):
    """The keys that LoRA and QLoRA share."""

    default_learning_rate: ClassVar[float] = 2e-4
    usual_learning_rates: ClassVar[tuple[float, float]] = (1e-5, 2e-3)

    rank: int = Field(16, ge=1, le=4096)
    """Width of the low-rank update; higher can learn more and costs more memory."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update."""
    target_modules: Targets = "all-linear"
    """`all-linear`, a list of module names, or a regular expression on full module names."""
    exclude_modules: Names = ()
    """Module names that are left alone although target_modules names them."""
    layers: Layers | None = None
    """Indices of the layers to tune; all of them when absent."""
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Module name or regular expression -> another rank."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Module name or regular expression -> another alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks stable."""
    use_dora: bool = False
    """Train the magnitude of each weight apart from its direction; slower, merges exactly."""
    loraplus_lr_ratio: float = Field(1.0, ge=1)
    """LoRA+: the factor on the learning rate of the B matrices; 16 in the paper."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained too."""
    init: Literal["kaiming", "gaussian", "eva"] = "kaiming"
    """Start of the A matrices; B starts at zero. `eva` takes directions from the training data."""
    modules_to_save: Names = ()
    """Modules trained whole and saved beside the update, such as `lm_head`."""
    trainable_token_indices: Indices = ()
    """Token ids whose embedding rows are trained."""

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """DoRA rescales the weight by its own norm, which rounds."""
        return not self.use_dora

    @property
    def initializes_from_data(self) -> bool:
        return self.init == "eva"

    @model_validator(mode="after")
    def _check(self) -> LowRank:
        if self.init == "eva" and self.use_dora:
            text = "`eva` does not work with `use_dora: true`; remove one of them"
            raise Conflict([(("init",), text)])
        return self

    def trainable_parameters(self, architecture: Architecture) -> int:
        total = 0
        for linear in self.targets(architecture):
            total += sum(self._ranks(linear)) * (linear.inputs + linear.outputs)
            total += linear.count * linear.outputs if self.use_dora else 0
            biases = self.bias == "lora_only" and linear.bias
            total += linear.count * linear.outputs if biases else 0
        if self.bias == "all":
            total += sum(x.count * x.outputs for x in architecture.linears if x.bias)
        return total + whole_parameters(
            architecture, self.modules_to_save, self.trainable_token_indices
        )

    def footprint(self, architecture: Architecture) -> Footprint:
        targets = tuple(self.targets(architecture))
        return Footprint(
            trains_head="lm_head" in self.modules_to_save,
            trains_embeddings=trains_embeddings(
                architecture, self.modules_to_save, self.trainable_token_indices
            ),
            targets=targets,
            rank=self.rank,
            ranks=tuple((x.name, self._rank(x)) for x in targets if self._rank(x) != self.rank),
            dropout=self.dropout > 0,
            magnitudes=self.use_dora,
            fusible=self._fusible(),
        )

    def _rank(self, target: Linear) -> int:
        """The largest rank of a target's modules: rather too much than too little."""
        return max(self._ranks(target))

    def _ranks(self, target: Linear) -> list[int]:
        """The rank of each of a target's modules."""
        if not self.rank_pattern:
            return [self.rank] * target.count
        return [_by_pattern(self.rank_pattern, path, self.rank) for path, _ in target.paths()]

    def _fusible(self) -> bool:
        others = self.dropout > 0 or self.use_dora or self.bias != "none"
        return not others and set(self.modules_to_save) <= {"embed_tokens"}

    def thriftier(self) -> list[Thrift]:
        found = []
        if self.use_dora:
            found.append(Thrift({"use_dora": False}, "trains no magnitudes: plain LoRA"))
        if self.rank >= 16:
            found.append(Thrift({"rank": self.rank // 2}, "can learn less"))
        return found

    def targets(self, architecture: Architecture) -> list[Linear]:
        """The linear modules that get an update, as groups."""
        from peftcli.architecture.targets import linear_shapes

        targets = self.resolved_targets(architecture)
        found = linear_shapes(architecture, targets, self.layers)
        return [x for x in found if not _ends_with(x.name, self.exclude_modules)]

    def resolved_targets(self, architecture: Architecture) -> Targets:
        """`all-linear` in PEFT's terms.

        Of a mixture only the attention: transformers 5 fuses experts into single parameters, and
        PEFT would quietly tune all of them and the router at twice the rank. With `layers`, names
        instead of the word, because PEFT does not take the two together.
        """
        if self.target_modules != "all-linear":
            return self.target_modules
        family = family_of(architecture.model_type)
        if family is not None and family.experts:
            return family.attention_linears
        return tuple(architecture.linear_names()) if self.layers else "all-linear"

    def problems(self, architecture: Architecture) -> list[tuple[tuple[str, ...], str]]:
        beyond = layer_problem(architecture, self.layers) if self.layers else None
        targets = self.targets(architecture)
        if beyond is not None:
            return [beyond]
        if not targets:
            names = ", ".join(architecture.linear_names())
            return [(("target_modules",), f"matches nothing in this model; it has {names}")]
        found = [tokens_problem(architecture, self.trainable_token_indices)]
        if self.layers and isinstance(self.resolved_targets(architecture), str):
            found.append((("layers",), "does not go with a regular expression; put it in there"))
        if any(linear.kind == "head" for linear in targets):
            text = "the output head cannot carry an update; put `lm_head` in modules_to_save"
            found.append((("target_modules",), text))
        if self._names_experts(architecture):
            text = "names experts, which are fused in this model and cannot be tuned one by one"
            found.append((("target_modules",), f"{text}; write `all-linear`"))
        smallest = min(targets, key=lambda x: min(x.inputs, x.outputs))
        side = min(smallest.inputs, smallest.outputs)
        if self.rank > side:
            text = f"{self.rank} is above {side}, the smaller side of {smallest.suffix}; lower it"
            found.append((("rank",), text))
        return [problem for problem in found if problem is not None]

    def _names_experts(self, architecture: Architecture) -> bool:
        fused = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate")
        names = () if isinstance(self.target_modules, str) else self.target_modules
        return bool(architecture.experts) and any(
            name.rpartition(".")[2] in fused for name in names
        )

    def peft_config(self, architecture: Architecture) -> LoraConfig:
        from peft import EvaConfig, LoraConfig

        init = True if self.init == "kaiming" else self.init
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=_plain(self.resolved_targets(architecture)),
            exclude_modules=list(self.exclude_modules) or None,
            layers_to_transform=None if self.layers is None else list(self.layers),
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            bias=self.bias,
            init_lora_weights=init,
            eva_config=EvaConfig(rho=1.0) if self.init == "eva" else None,  # every rank as asked
            modules_to_save=list(self.modules_to_save) or None,
            trainable_token_indices=list(self.trainable_token_indices) or None,
        )

    def learning_rate_multipliers(self) -> dict[str, float]:
        return {"lora_B": self.loraplus_lr_ratio} if self.loraplus_lr_ratio != 1 else {}


def _ends_with(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _by_pattern(pattern: dict[str, int], path: str, default: int) -> int:
    """PEFT's rule: the first key that matches the whole path or its end."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _plain(targets: Targets) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)
