"""Every name in families.py exists in a model of that family, and none is missing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peftcli.architecture.families import FAMILIES, Family, family_of

MODEL_TYPES = [name for family in FAMILIES for name in family.model_types]


def _layer_modules(model_type: str, family: Family) -> dict[str, nn.Module]:
    """Modules of all layers of a model without weights, by their name inside the layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    layers = model.get_submodule(family.layers)
    return {
        name: module for layer in layers for name, module in layer.named_modules() if name != ""
    }


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_names_exist_and_are_complete(family: Family) -> None:
    modules: dict[str, nn.Module] = {}
    for model_type in family.model_types:
        found = _layer_modules(model_type, family)
        for site in family.adapter_sites("houlsby") + family.adapter_sites("parallel"):
            assert site in found, model_type
        modules |= found

    linears = {
        name
        for name, module in modules.items()
        if isinstance(module, Conv1D if family.conv1d else nn.Linear)
    }
    assert linears == {*family.attention_linears, *family.mlp_linears}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.experts], ids=lambda f: f.experts)
def test_experts_are_fused_parameters(family: Family) -> None:
    for model_type in family.model_types:
        experts = _layer_modules(model_type, family)[family.experts]
        names = {name for name, _ in experts.named_parameters(recurse=False)}
        assert set(family.expert_parameters) <= names, model_type


def test_no_model_type_is_listed_twice() -> None:
    assert len(MODEL_TYPES) == len(set(MODEL_TYPES))


def test_lookup() -> None:
    llama = family_of("llama")
    assert llama is not None
    assert llama.adapter_sites("houlsby") == ("self_attn.o_proj", "mlp.down_proj")
    assert llama.adapter_sites("pfeiffer") == ("mlp.down_proj",)
    assert llama.adapter_sites("parallel") == ("mlp",)
    assert family_of("no-such-model") is None
