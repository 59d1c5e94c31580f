"""What a bottleneck layer computes, and that it can be trained on every kind of base."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_models import (
    HIDDEN,
    LAYERS,
    bottleneck_config,
    llama_2_7b_without_weights,
    logits,
    tiny_model,
    tiny_nf4_model,
    token_ids,
    train_steps,
    with_bottleneck,
)
from transformers import PreTrainedModel

from peftcli.methods.bottleneck_layer import NON_LINEARITIES, BottleneckLayer
from peftcli.methods.bottleneck_tuner import BottleneckConfig

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def saved_base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_forward_is_the_formula(base: PreTrainedModel, placement: str, use_bias: bool) -> None:
    model = with_bottleneck(
        base, placement=placement, use_bias=use_bias, scaling=4.0, init_weights=False
    )
    layer = next(module for module in model.modules() if isinstance(module, BottleneckLayer))
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    x = torch.randn(3, 5, layer.base_layer.in_features if placement != "parallel" else HIDDEN)

    output = layer.base_layer(x)
    read = x if placement == "parallel" else output
    hidden = read @ down.weight.T + (down.bias if use_bias else 0)
    update = torch.relu(hidden) @ up.weight.T + (up.bias if use_bias else 0)

    torch.testing.assert_close(layer(x), output + 4.0 * update)


@pytest.mark.parametrize("name", NON_LINEARITIES)
def test_non_linearities_differ_from_the_base(base: PreTrainedModel, name: str) -> None:
    before = logits(base)
    after = logits(with_bottleneck(base, non_linearity=name, init_weights=False))
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


def test_reduction_factor_rounds_and_never_reaches_zero(base: PreTrainedModel) -> None:
    assert BottleneckConfig(reduction_factor=3).size(32) == 11
    assert BottleneckConfig(reduction_factor=1000).size(32) == 1
    model = with_bottleneck(base, bottleneck_size=None, reduction_factor=8, use_bias=False)
    assert model.get_nb_trainable_parameters()[0] == 2 * LAYERS * 2 * HIDDEN * (HIDDEN // 8)


@pytest.mark.parametrize(("use_bias", "expected"), [(False, 33_554_432), (True, 33_820_672)])
def test_count_on_llama_2_7b(use_bias: bool, expected: int) -> None:
    with torch.device("meta"):
        model = with_bottleneck(llama_2_7b_without_weights(), bottleneck_size=64, use_bias=use_bias)
    assert model.get_nb_trainable_parameters()[0] == expected
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_adapter_follows_a_meta_base_outside_the_context() -> None:
    with torch.device("meta"):
        base = tiny_model("llama", dtype=torch.bfloat16)
    model = with_bottleneck(base, placement="parallel")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(
    base: PreTrainedModel, placement: str
) -> None:
    before = copy.deepcopy(base.state_dict())
    model = with_bottleneck(base, placement=placement)
    losses = train_steps(model, steps=8)
    assert losses[-1] < losses[0] - 0.02
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_gradient_checkpointing_gives_the_same_gradients(
    base: PreTrainedModel, placement: str, use_reentrant: bool
) -> None:
    model = with_bottleneck(base, placement=placement, init_weights=False).train()
    ids = token_ids()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_base_keeps_its_dtype_and_exact_start(adapter_dtype: torch.dtype) -> None:
    base = tiny_model("llama", dtype=torch.bfloat16)
    before = logits(base)
    keep_fp32 = adapter_dtype == torch.float32
    model = get_peft_model(base, bottleneck_config(), autocast_adapter_dtype=keep_fp32).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {parameter.dtype for parameter in trained} == {adapter_dtype}
    assert logits(model).dtype == torch.bfloat16
    assert torch.equal(logits(model), before)
    losses = train_steps(model, steps=4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nf4_base_with_checkpointing(
    saved_base: Path, placement: str, adapter_dtype: torch.dtype
) -> None:
    base = tiny_nf4_model(saved_base)
    before = logits(base)
    model = with_bottleneck(base, placement=placement)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    assert torch.equal(logits(model), before)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = train_steps(model, steps=4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(base_dtype: torch.dtype) -> None:
    model = with_bottleneck(tiny_model("llama", dtype=base_dtype), placement="parallel")
    losses = []
    for _ in range(4):  # a fresh context for each step, for it keeps its casts of the weights
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses += train_steps(model)
    assert losses[-1] < losses[0]


def test_dropout_acts_in_training_only(base: PreTrainedModel) -> None:
    model = with_bottleneck(base, dropout=0.5, init_weights=False)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
