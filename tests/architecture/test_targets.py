"""target_modules mean to us what they mean to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from peftcli.architecture.config import Architecture, linear_shapes, read_architecture
from peftcli.errors import RecipeError


def saved(config: Any, folder: Path) -> Architecture:
    config.save_pretrained(folder)
    return read_architecture(folder)


NAMES = (["q_proj", "v_proj"], ["self_attn.q_proj"], ["proj"], ["lm_head"])
PATHS = (["model.layers.0.mlp.up_proj"], r".*\.(q|k)_proj", r"q_proj", r".*layers\.1\..*")


@pytest.mark.parametrize(
    ("target", "layers"),
    [(names, layers) for names in NAMES for layers in (None, [0], 1, [])]
    + [(path, None) for path in PATHS],
)
def test_targets_match_as_in_peft(target: Any, layers: Any, tmp_path: Path) -> None:
    config = tiny_config("llama")
    peft_config = LoraConfig(target_modules=target, layers_to_transform=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in modules if check_target_module_exists(peft_config, name)}
    if target == ["lm_head"] and layers in ([0], 1):
        wanted = set()  # PEFT takes a whole path in every layer; ours keeps to the layers named
    found = linear_shapes(saved(config, tmp_path), target, layers)
    assert {path for linear in found for path, _ in linear.paths()} == wanted


def test_all_linear_leaves_the_head_out_and_takes_the_vision_tower(tmp_path: Path) -> None:
    architecture = saved(tiny_config("gemma3"), tmp_path)
    found = linear_shapes(architecture, "all-linear", [0])
    assert {linear.kind for linear in found} == {"attention", "mlp", "vision"}
    assert all(linear.layers == (0,) for linear in found)


def test_a_wrong_expression_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="regular expression"):
        linear_shapes(saved(tiny_config("llama"), tmp_path), "(")
