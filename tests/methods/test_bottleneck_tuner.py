"""The bottleneck adapter does everything that PEFT's own methods do."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny_models import (
    LAYERS,
    bottleneck_config,
    logits,
    tiny_model,
    train_steps,
    with_bottleneck,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peftcli.methods.bottleneck_tuner import BottleneckConfig

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def saved_base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_saved_adapter_loads_with_every_loader(
    saved_base: Path, tmp_path: Path, placement: str
) -> None:
    folder = tmp_path / "adapter"
    model = with_bottleneck(AutoModelForCausalLM.from_pretrained(saved_base), placement=placement)
    train_steps(model)
    expected = logits(model)
    model.save_pretrained(folder)

    loaded_config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(loaded_config, BottleneckConfig)
    assert loaded_config.placement == placement
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_base), folder)
    assert torch.equal(logits(again), expected)
    assert trainable_names(again) == set()
    quick = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved_base), folder, low_cpu_mem_usage=True
    )
    assert torch.equal(logits(quick), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    resumed = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved_base), folder, is_trainable=True
    )
    assert trainable_names(resumed) == trainable_names(model)


def test_adapter_file_holds_the_adapter_only(base: PreTrainedModel, tmp_path: Path) -> None:
    with_bottleneck(base).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "BOTTLENECK"
    assert set(written["target_modules"]) == {"self_attn.o_proj", "mlp.down_proj"}
    names = get_peft_model_state_dict(with_bottleneck(tiny_model("llama"))).keys()
    assert len(names) == LAYERS * 2 * 4
    assert all("bottleneck_" in name for name in names)


def test_state_dict_survives_torch_save(base: PreTrainedModel, tmp_path: Path) -> None:
    model = with_bottleneck(base, init_weights=False)
    expected = logits(model)
    torch.save(get_peft_model_state_dict(model), tmp_path / "adapter.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")

    other = with_bottleneck(tiny_model("llama"))
    set_peft_model_state_dict(other, torch.load(tmp_path / "adapter.pt"))
    assert torch.equal(logits(other), expected)
    whole = with_bottleneck(tiny_model("llama", seed=1))
    whole.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(logits(whole), expected)


def test_deepcopy_is_independent(base: PreTrainedModel) -> None:
    model = with_bottleneck(base)
    twin = copy.deepcopy(model)
    train_steps(model, steps=2)
    assert not torch.equal(logits(model), logits(twin))
    model.disable_adapter_layers()
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_two_adapters_on_one_base(base: PreTrainedModel, placement: str) -> None:
    plain = logits(base)
    model = with_bottleneck(base, "first", placement=placement, init_weights=False)
    first = logits(model)
    before = trainable_names(model)
    model.add_adapter(
        "second", bottleneck_config(placement=placement, init_weights=False, bottleneck_size=7)
    )
    assert torch.equal(logits(model), first)
    assert trainable_names(model) == before

    model.set_adapter("second")
    second = logits(model)
    assert trainable_names(model) == {name.replace("first", "second") for name in before}
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.delete_adapter("first")
    assert torch.equal(logits(model), second)
    assert torch.equal(logits(model.unload()), plain)


def test_active_adapters_add_up_in_any_order(base: PreTrainedModel) -> None:
    model = with_bottleneck(base, "first", init_weights=False)
    model.add_adapter("second", bottleneck_config(init_weights=False))
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    model.base_model.set_adapter(["second", "first"])
    torch.testing.assert_close(logits(model), both)
    for name in ("first", "second"):
        model.set_adapter(name)
        assert not torch.allclose(logits(model), both)


def test_parallel_and_sequential_adapters_do_not_mix(base: PreTrainedModel) -> None:
    model = with_bottleneck(base, "first", placement="houlsby")
    with pytest.raises(ValueError, match="cannot sit on one model"):
        model.add_adapter("second", bottleneck_config(placement="parallel"))
    assert torch.isfinite(logits(model)).all()


def test_requires_grad_can_be_switched_per_adapter(base: PreTrainedModel) -> None:
    model = with_bottleneck(base, "first")
    model.add_adapter("second", bottleneck_config())
    model.set_requires_grad("second")
    assert {name.split(".")[-2] for name in trainable_names(model)} == {"first", "second"}
    model.set_requires_grad(["first", "second"], requires_grad=False)
    assert trainable_names(model) == set()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_unload_gives_the_base_back(base: PreTrainedModel, placement: str) -> None:
    expected = logits(base)
    modules = [name for name, _ in base.named_modules()]
    restored = with_bottleneck(base, placement=placement, init_weights=False).unload()
    assert [name for name, _ in restored.named_modules()] == modules
    assert torch.equal(logits(restored), expected)


def test_merging_is_refused_with_the_reason(base: PreTrainedModel) -> None:
    model = with_bottleneck(base)
    for merge in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ValueError, match=r"cannot be merged .* not linear\. Serve the base"):
            merge()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "exactly one of"),
        ({"bottleneck_size": 4, "reduction_factor": 2}, "exactly one of"),
        ({"bottleneck_size": 0}, "above zero"),
        ({"reduction_factor": -1.0}, "above zero"),
        ({"bottleneck_size": 4, "dropout": 1.0}, "`dropout` is 1.0"),
        ({"bottleneck_size": 4, "non_linearity": "cube"}, "'cube'.*one of relu"),
        ({"bottleneck_size": 4, "placement": "above"}, "'above'.*one of houlsby"),
        (
            {"bottleneck_size": 4, "target_modules": ".*", "layers_to_transform": [0]},
            "`layers_to_transform` needs",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BottleneckConfig(**settings)


def test_the_new_type_behaves_like_a_built_in_one() -> None:
    member = PeftType("BOTTLENECK")
    assert member is PeftType["BOTTLENECK"] is PeftType.BOTTLENECK
    assert member == "BOTTLENECK"
    assert list(PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps(member) == '"BOTTLENECK"'
    assert bottleneck_config().to_dict()["peft_type"] is member
