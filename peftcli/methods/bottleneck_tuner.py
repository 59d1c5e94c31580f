"""Bottleneck adapters as a PEFT method; importing this file registers it under `BOTTLENECK`.

Houlsby et al., 2019, arXiv 1902.00751; Pfeiffer et al., 2021, arXiv 2005.00247; He et al., 2022,
arXiv 2110.04366.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from peftcli.architecture.families import Placement, family_of
from peftcli.methods.bottleneck_layer import NON_LINEARITIES, NOT_MERGEABLE, BottleneckLayer

PEFT_TYPE = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """Settings of bottleneck adapters.

    Exactly one of `bottleneck_size` and `reduction_factor` is given. Without `target_modules` the
    sites follow from `placement` and the model's family. `use_bias` is not called `bias`, because
    PEFT reads `bias` of any configuration as an instruction on the base model's biases.
    """

    bottleneck_size: int | None = None
    reduction_factor: float | None = None
    non_linearity: str = "relu"
    dropout: float = 0.0
    use_bias: bool = True
    placement: Placement = "houlsby"
    scaling: float = 1.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def size(self, width: int) -> int:
        """Return the width of the bottleneck on a module that feeds it `width` features."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        return max(1, round(width / (self.reduction_factor or 1.0)))

    def _problem(self) -> str | None:
        if (self.bottleneck_size is None) == (self.reduction_factor is None):
            return "Give exactly one of `bottleneck_size` and `reduction_factor`."
        if (self.bottleneck_size or self.reduction_factor or 0) <= 0:
            return "`bottleneck_size` and `reduction_factor` must be above zero."
        if not 0 <= self.dropout < 1:
            return f"`dropout` is {self.dropout}; it must be at least 0 and below 1."
        if self.non_linearity not in NON_LINEARITIES:
            known = ", ".join(NON_LINEARITIES)
            return f"`non_linearity` is {self.non_linearity!r}; it must be one of {known}."
        if self.placement not in get_args(Placement):
            known = ", ".join(get_args(Placement))
            return f"`placement` is {self.placement!r}; it must be one of {known}."
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            return "`layers_to_transform` needs `target_modules` as a list, not as a pattern."
        return None


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """The PEFT tuner that finds the sites and puts a `BottleneckLayer` around each."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # families.py answers instead

    def _prepare_adapter_config(
        self, peft_config: BottleneckConfig, model_config: dict[str, Any]
    ) -> BottleneckConfig:
        if peft_config.target_modules is not None:
            return peft_config
        family = family_of(model_config["model_type"])
        sites = family.adapter_sites(peft_config.placement) if family else ()
        if not sites:
            raise ValueError(
                f"No sites are known for `{peft_config.placement}` adapters in models of type "
                f"`{model_config['model_type']}`. Please specify `target_modules`."
            )
        peft_config.target_modules = set(sites)
        if family and family.other_towers and peft_config.exclude_modules is None:
            peft_config.exclude_modules = family.other_towers
        return peft_config

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, _hidden_size(self.get_model_config(self.model)))
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, BottleneckLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading; PEFT would hand over a weight, which a whole block does not have
            setattr(parent, child_name, new_module)

    def _check_new_adapter_config(self, config: BottleneckConfig) -> None:
        super()._check_new_adapter_config(config)
        if len({other.placement == "parallel" for other in self.peft_config.values()}) > 1:
            raise ValueError(
                "`parallel` adapters wrap the modules that carry the other placements, so both "
                "cannot sit on one model. Load the second adapter on a second copy of the model."
            )

    def _check_merge_allowed(self) -> None:
        raise ValueError(NOT_MERGEABLE)


def _hidden_size(model_config: dict[str, Any]) -> int | None:
    text_config = model_config.get("text_config") or model_config
    for key in ("hidden_size", "n_embd", "d_model"):
        if key in text_config:
            return int(text_config[key])
    return None


def _register() -> None:
    """Add the method to PEFT, whose enum of types has no door for methods from outside."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_ = member._value_ = PEFT_TYPE
        type.__setattr__(PeftType, PEFT_TYPE, member)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
    if PeftType[PEFT_TYPE] not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=PEFT_TYPE.lower(),
            config_cls=BottleneckConfig,
            model_cls=BottleneckModel,
            prefix=BottleneckModel.prefix,
        )


_register()
