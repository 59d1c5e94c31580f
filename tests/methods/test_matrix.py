"""Every method on every family: exact start, exact count, and the same model after loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import (
    HIDDEN,
    LAYERS,
    llama_2_7b_without_weights,
    logits,
    tiny_model,
    tiny_nf4_model,
    train_steps,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peftcli.architecture.families import Family, Placement, family_of
from peftcli.methods.bottleneck_tuner import BottleneckConfig

MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3"),
    *("gpt_neox", "gpt2", "opt", "falcon"),
)
RANK = 4
BOTTLENECK = 8

Base = Literal["float32", "bfloat16", "nf4"]


@dataclass(frozen=True)
class Tuning:
    """A way of tuning: what the base is, what PEFT gets, and how many values are trained."""

    base: Base
    config: Callable[[Family], PeftConfig] | None
    count: Callable[[Family, nn.Module], int]
    placement: Placement | None = None


def lora(family: Family, use_dora: bool = False) -> LoraConfig:
    # PEFT's all-linear reaches the experts of some mixtures too: see the last test.
    targets = list(family.attention_linears) if family.experts else "all-linear"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=targets,
        use_dora=use_dora,
    )


def adapter(base: Base, placement: Placement) -> Tuning:
    def config(family: Family) -> BottleneckConfig:
        return BottleneckConfig(
            task_type="CAUSAL_LM", bottleneck_size=BOTTLENECK, placement=placement
        )

    def count(family: Family, model: nn.Module) -> int:
        one = 2 * HIDDEN * BOTTLENECK + BOTTLENECK + HIDDEN
        return LAYERS * len(family.adapter_sites(placement)) * one

    return Tuning(base, config, count, placement)


def lora_count(family: Family, model: nn.Module) -> int:
    return sum(RANK * (inputs + outputs) for inputs, outputs in linears(family, model))


def dora_count(family: Family, model: nn.Module) -> int:
    return lora_count(family, model) + sum(outputs for _, outputs in linears(family, model))


def full_count(family: Family, model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


METHODS: dict[str, Tuning] = {
    "lora": Tuning("bfloat16", lora, lora_count),
    "dora": Tuning("float32", lambda family: lora(family, use_dora=True), dora_count),
    "qlora": Tuning("nf4", lora, lora_count),
    "adapter-houlsby": adapter("bfloat16", "houlsby"),
    "adapter-pfeiffer": adapter("bfloat16", "pfeiffer"),
    "adapter-parallel": adapter("bfloat16", "parallel"),
    "adapter-nf4": adapter("nf4", "houlsby"),
    "full": Tuning("bfloat16", None, full_count),
}


def cases() -> list[tuple[str, str]]:
    """Pairs of method and model type; without parallel adapters where no block carries them."""
    return [
        (method, model_type)
        for model_type in MODEL_TYPES
        for method, tuning in METHODS.items()
        if tuning.placement is None or known_family(model_type).adapter_sites(tuning.placement)
    ]


def known_family(model_type: str) -> Family:
    family = family_of(model_type)
    assert family is not None
    return family


def linears(family: Family, model: nn.Module) -> list[tuple[int, int]]:
    """Widths of every linear in every layer, as families.py names them."""
    found = []
    for layer in model.get_submodule(family.layers):
        for name in (*family.attention_linears, *family.mlp_linears):
            module = dict(layer.named_modules()).get(name)
            if isinstance(module, nn.Linear):
                found.append((module.in_features, module.out_features))
            elif module is not None:
                found.append((module.nx, module.nf))
    return found


def load_base(folder: Path, base: Base) -> PreTrainedModel:
    if base == "nf4":
        return tiny_nf4_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, base)).eval()


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")

    def folder_of(model_type: str) -> Path:
        folder = root / model_type
        if not folder.exists():
            tiny_model(model_type).save_pretrained(folder)
        return folder

    return folder_of


@pytest.mark.parametrize(("method", "model_type"), cases())
def test_method_on_family(
    method: str, model_type: str, saved_models: Callable[[str], Path], tmp_path: Path
) -> None:
    tuning, family = METHODS[method], known_family(model_type)
    base = load_base(saved_models(model_type), tuning.base)
    expected_count = tuning.count(family, base)
    before = logits(base)
    model = base if tuning.config is None else get_peft_model(base, tuning.config(family)).eval()

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == expected_count
    if method == "dora":  # it divides each column by its norm and multiplies again: rounding
        torch.testing.assert_close(logits(model), before)
    else:
        assert torch.equal(logits(model), before)

    train_steps(model)
    after = logits(model)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    if tuning.config is None:
        loaded = load_base(tmp_path, tuning.base)
    else:
        again = load_base(saved_models(model_type), tuning.base)
        loaded = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(logits(loaded), after)


def test_lora_count_on_llama_2_7b() -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    with torch.device("meta"):
        model = get_peft_model(
            llama_2_7b_without_weights(), LoraConfig(r=16, target_modules=targets)
        )
    assert model.get_nb_trainable_parameters()[0] == 16_777_216


def test_all_linear_reaches_fused_experts_and_the_router(tmp_path: Path) -> None:
    """PEFT gives each of E experts a factor pair, with twice the rank on the fused gate and up."""
    base, family = tiny_model("qwen3_moe"), known_family("qwen3_moe")
    config = base.config
    experts, width = config.num_experts, config.moe_intermediate_size
    fused = experts * (2 * RANK * (HIDDEN + 2 * width) + RANK * (width + HIDDEN))
    router = RANK * (HIDDEN + experts)
    expected = lora_count(family, base) + LAYERS * (fused + router)

    model = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear")).eval()
    assert model.get_nb_trainable_parameters()[0] == expected
    train_steps(model)
    after = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path)
    assert torch.equal(logits(loaded), after)
