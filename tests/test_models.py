"""Loading: what is not there, what is not what it says, and a 4-bit base that stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig

from peftcli.adapters import load_adapter
from peftcli.basefiles import locate
from peftcli.errors import ArtefactError, UsageError
from peftcli.models import Device, load_base, load_config, load_tokenizer
from peftcli.recipe.schema import Model

CPU = Device("cpu", "float32", "CPU", None)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize("stored", [False, True])
def test_an_evaluation_leaves_a_4_bit_base_as_it_was(
    stored: bool, base_model: Path, tmp_path: Path
) -> None:
    """bitsandbytes repacks and rounds NF4 weights on some CPUs, and later gradients are wrong."""
    model = load_base(Model(name=str(base_model)), CPU, NF4)
    if stored:
        model.save_pretrained(tmp_path)
        model = load_base(Model(name=str(tmp_path)), CPU)
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(linear, Linear4bit)
    assert not linear.support_avx512bf16_for_cpu
    ids = torch.arange(3, 19)[None]

    def gradient() -> torch.Tensor:
        model.train()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()
        assert embedded.grad is not None
        return embedded.grad

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(ids)
    assert torch.equal(gradient(), before)


def test_a_checkpoint_that_is_quantised_already_is_held_as_it_is_stored(
    base_model: Path, tmp_path: Path
) -> None:
    load_base(Model(name=str(base_model)), CPU, NF4).save_pretrained(tmp_path)
    model = load_base(Model(name=str(tmp_path)), CPU)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), Linear4bit)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_checkpoint_whose_reader_is_not_installed(
    base_model: Path, tmp_path: Path, method: str
) -> None:
    stored = shutil.copytree(base_model, tmp_path / "stored")
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=r"does not load: .*pip install") as caught:
        load_base(Model(name=str(stored)), CPU)
    assert "install" in caught.value.hint


@pytest.mark.parametrize("name", ["bundled:tyni", "/no/such/folder", "./model"])
def test_a_model_that_is_not_here(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model: "):
        locate(Model(name=name))


def test_a_hub_model_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a folder here nor a model the hub gave"):
        load_config(Model(name="somebody/nothing"))


def test_a_model_with_code_of_its_own_is_refused_without_asking(
    base_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("open('ran', 'w')\n")
    with pytest.raises(ArtefactError, match="Python code of its own, which was not run"):
        load_config(Model(name=str(folder)))
    assert not list(tmp_path.rglob("ran"))


def test_pickled_weights_are_not_loaded(base_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match="safetensors"):
        load_base(Model(name=str(folder)), CPU)


def test_damaged_weights_are_named(base_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtefactError, match="model: "):
        load_base(Model(name=str(folder)), CPU)


def test_a_tokenizer_gets_a_pad_token_of_its_own(base_model: Path) -> None:
    tokenizer = load_tokenizer(Model(name=str(base_model)))
    assert tokenizer.pad_token == "<pad>" != tokenizer.eos_token


def test_a_folder_without_an_adapter(base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="holds no adapter"):
        load_adapter(load_base(Model(name=str(base_model)), CPU), tmp_path)
