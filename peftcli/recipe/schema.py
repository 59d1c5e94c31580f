"""The recipe, put together from its sections, and the rules between them.

Keys use the names of TRL and PEFT where they mean the same. The method sections are in
peftcli/methods.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from peftcli.methods import AnyMethod
from peftcli.methods.base import Section, refuse_conflicts
from peftcli.recipe.sections.data import Data, Source
from peftcli.recipe.sections.evaluation import Evaluation, Gates
from peftcli.recipe.sections.model import Model
from peftcli.recipe.sections.training import Training

__all__ = ["SECTIONS", "Data", "Evaluation", "Gates", "Model", "Recipe", "Source", "Training"]


def _as_mapping(key: str) -> BeforeValidator:
    """A plain string stands for a section that holds only `key`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class Recipe(Section):
    """One run: a model, a method, data, and how to train."""

    model: Annotated[Model, _as_mapping("name")]
    """The base model: a hub id, a local folder, `bundled:tiny`, or a section."""
    method: Annotated[AnyMethod, _as_mapping("name")]
    """The tuning method: a name, or a section with its keys."""
    data: Data
    """The rows."""
    training: Training = Field(default_factory=Training)
    """The training run."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Evaluation while training."""
    output: str = Field(min_length=1)
    """The run folder."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of initial weights, row order and dropout."""

    @model_validator(mode="after")
    def _between_sections(self) -> Recipe:
        found: list[tuple[tuple[str, ...], str]] = []
        saves, looks = self.training.save_steps, self.evaluation.steps
        if saves and looks and self.evaluation.keep_best and saves % looks:
            text = (
                f"{saves} is no multiple of `evaluation.steps` {looks}, so the best checkpoint "
                f"could not be kept; write {looks * max(1, saves // looks)}"
            )
            found.append((("training", "save_steps"), text))
        for key in ("steps", "early_stopping", "gates"):
            written = self.evaluation.model_dump(include={key})[key] is not None
            if written and self.data.eval is None:
                text = "needs held-out rows, and `data.eval` is null; name some, or remove it"
                found.append((("evaluation", key), text))
        gates = self.evaluation.gates
        if gates and gates.max_merge_drift is not None and not self.method.mergeable:
            text = f"nothing is merged after `{self.method.name}`; remove it"
            found.append((("evaluation", "gates", "max_merge_drift"), text))
        refuse_conflicts([*found, *self._against_fused_layers()])
        return self

    def _against_fused_layers(self) -> list[tuple[tuple[str, ...], str]]:
        """Keys that keep the fused layers away, where something needs those."""
        if self.method.frozen_in_fp8:
            needs = "`method.quantization: fp8` needs"
        elif self.training.asks_for_fused_layers:
            needs = f"`training.checkpointing: {self.training.checkpointing}` needs"
        else:
            return []
        found = {
            ("training", "kernels"): (self.training.kernels == "plain", "`auto`"),
            ("training", "neftune_noise_alpha"): (
                self.training.neftune_noise_alpha is not None,
                "it absent",
            ),
            ("model", "attention"): (self.model.attention != "auto", "`auto`"),
            ("model", "dtype"): (
                self.model.dtype in ("float16", "float32"),
                "`auto` or `bfloat16`",
            ),
        }
        return [(key, f"{needs} {what}") for key, (clash, what) in found.items() if clash]

    @property
    def learning_rate(self) -> float:
        """The recipe's learning rate, or the method's own."""
        return self.training.learning_rate or self.method.default_learning_rate

    @property
    def optimizer(self) -> str:
        """The recipe's optimizer, or the method's own."""
        return self.training.optimizer or self.method.optimizer()

    def warnings(self) -> list[str]:
        """What is allowed and unusual, one sentence each."""
        low, high = self.method.usual_learning_rates
        if low <= self.learning_rate <= high:
            return []
        return [
            f"training.learning_rate: {self.learning_rate:g} lies outside the usual "
            f"{low:g} to {high:g} for {self.method.name}; "
            f"{self.method.default_learning_rate:g} is the default. Low-rank and adapter methods "
            "stand about ten times the rate of full fine-tuning"
        ]


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "data": Data,
    "train": Source,
    "eval": Source,
    "training": Training,
    "evaluation": Evaluation,
    "gates": Gates,
}
