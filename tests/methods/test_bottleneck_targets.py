"""Which modules of a model get a bottleneck adapter, and what travels with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import (
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    VOCABULARY,
    logits,
    tiny_model,
    train_steps,
    with_bottleneck,
)
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from peftcli.architecture.families import FAMILIES, Family, Placement
from peftcli.methods.bottleneck_tuner import BottleneckConfig


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_sites_of_every_model_type(family: Family, placement: Placement) -> None:
    sites = family.adapter_sites(placement)
    for model_type in family.model_types if sites else ():
        base = tiny_model(model_type)
        before = logits(base)
        model = with_bottleneck(base, placement=placement)
        assert len(model.targeted_module_names) == LAYERS * len(sites), model_type
        assert torch.equal(logits(model), before), model_type
        train_steps(model)
        assert not torch.equal(logits(model), before), model_type


def test_modules_to_save_and_new_tokens_travel_with_the_adapter(tmp_path: Path) -> None:
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
    model = with_bottleneck(tiny_model("llama"), **settings)
    adapter = LAYERS * 2 * (2 * HIDDEN * 4 + 4 + HIDDEN)
    assert model.get_nb_trainable_parameters()[0] == adapter + (VOCABULARY + 2) * HIDDEN
    train_steps(model, steps=2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), expected)


def test_layers_to_transform(base: PreTrainedModel) -> None:
    model = with_bottleneck(base, layers_to_transform=[1])
    assert {name.split(".layers.")[1][0] for name in model.targeted_module_names} == {"1"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["o_proj"], {"o_proj"}),
        ({"q_proj", "down_proj"}, {"q_proj", "down_proj"}),
        (r".*\.(gate|up)_proj", {"gate_proj", "up_proj"}),
    ],
)
def test_explicit_targets(
    base: PreTrainedModel, targets: list[str] | set[str] | str, expected: set[str]
) -> None:
    model = with_bottleneck(base, target_modules=targets)
    assert {name.rsplit(".", 1)[-1] for name in model.targeted_module_names} == expected


def test_exclude_modules(base: PreTrainedModel) -> None:
    model = with_bottleneck(base, exclude_modules=["mlp.down_proj"])
    assert all(name.endswith("o_proj") for name in model.targeted_module_names)


def test_parallel_on_one_linear_maps_its_input_to_its_output(base: PreTrainedModel) -> None:
    model = with_bottleneck(base, placement="parallel", target_modules=["up_proj"], use_bias=False)
    assert model.get_nb_trainable_parameters()[0] == LAYERS * 4 * (HIDDEN + INTERMEDIATE)
    losses = train_steps(model, steps=4)
    assert losses[-1] < losses[0]


def test_the_vision_tower_is_left_alone() -> None:
    with torch.device("meta"):
        model = with_bottleneck(tiny_model("gemma3"), placement="parallel")
    assert len(model.targeted_module_names) == LAYERS
    assert all("language_model" in name for name in model.targeted_module_names)


def test_targets_that_match_nothing_are_an_error(base: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"no_such_module.* not found in the base model"):
        with_bottleneck(base, target_modules=["no_such_module"])


def test_a_module_without_a_width_is_an_error(base: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="is not supported"):
        with_bottleneck(base, target_modules=["input_layernorm"])


@pytest.mark.parametrize(("model_type", "placement"), [("opt", "parallel"), ("mamba", "houlsby")])
def test_unknown_sites_ask_for_target_modules(model_type: str, placement: str) -> None:
    model = nn.Module()
    model.config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"type `{model_type}`. Please specify `target_modules`"):
        get_peft_model(model, BottleneckConfig(bottleneck_size=4, placement=placement))
