"""A run folder, or anyone's adapter -> the model a user deploys."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import ties
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import token_ids, train_steps
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peftcli.adapters import wrap
from peftcli.architecture.config import architecture_from
from peftcli.bundled import bundled
from peftcli.errors import NumericalError, UsageError
from peftcli.fingerprint import FILE_NAME, fingerprint
from peftcli.merge.adapter import load_adapter
from peftcli.merge.base import Base
from peftcli.merge.checkpoint import read_safetensors
from peftcli.merge.options import MergeOptions, WeightedAdapter
from peftcli.merge.prompts import PLAIN, Prompts
from peftcli.merge.run import run
from peftcli.merge.servable import check_servable
from peftcli.merge.show import show_merge
from peftcli.merge.source import find_adapter
from peftcli.merge.verify import Subject, verify
from peftcli.models import Device, load_base
from peftcli.recipe.load import recipe_text, resolved
from peftcli.recipe.schema import Recipe

CPU = Device("cpu", "float32", "CPU", None)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def silent(text: str) -> None:
    """Drop what a merge tells."""


def make_run(folder: Path, method: str, steps: int = 4) -> PreTrainedModel:
    """A run folder of the bundled model, and the model as it was at the end of training."""
    recipe = Recipe.model_validate(
        {
            "model": "bundled:tiny",
            "method": {"name": method, "rank": 8},
            "data": {"train": "bundled:quickstart.train"},
            "output": str(folder),
        }
    )
    torch.manual_seed(0)
    base = load_base(recipe.model, CPU, recipe.method.quantization_config("float32"))
    architecture = architecture_from(base.config.to_dict(), "bundled:tiny")
    config = recipe.method.peft_config(architecture)
    assert config is not None
    model = wrap(base, config)
    train_steps(model, steps=steps)
    adapter, source = folder / "adapter", bundled("bundled:tiny")
    assert source is not None
    model.save_pretrained(str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template += "{# of this run #}"
    tokenizer.save_pretrained(str(adapter))
    model.generation_config.eos_token_id = [7]
    model.generation_config.save_pretrained(str(adapter))
    (adapter / FILE_NAME).write_text(fingerprint(source).to_json())
    manifest = {"status": "finished", "recipe": resolved(recipe), "device": vars(CPU)}
    (folder / "run.json").write_text(json.dumps(manifest))
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    return model.eval()


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("lora")
    return folder, make_run(folder, "lora")


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("qlora")
    return folder, make_run(folder, "qlora")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits.float()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_merged_folder_is_ready_to_deploy(lora_run: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = lora_run
    result = run(folder, MergeOptions(), silent)
    merged = folder / "merged"
    assert result.output == merged
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template.endswith("{# of this run #}")
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [7, tokenizer.eos_token_id]
    source = bundled("bundled:tiny")
    assert source is not None
    assert json.loads((merged / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    card = (merged / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert (folder / "recipe.yaml").read_text() in card
    report = json.loads((merged / "merge.json").read_text())
    assert report["base"]["kind"] == "original"
    assert report["verification"]["merged"]["top1_agreement"] > 0.98
    assert report["verification"]["prompts_from"] == "8 rows of the run's data"
    assert {stat.S_IMODE(file.stat().st_mode) for file in merged.iterdir()} == {0o644}
    assert [item.name for item in folder.iterdir() if item.name.startswith(".staging")] == []


def test_same_greedy_text(lora_run: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, model = lora_run
    options = MergeOptions(output=tmp_path / "out", save_dtype="float32", verify=False)
    run(folder, options, silent)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt in ("Write the order as JSON.\n", *PLAIN[:3]):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 10**6}
        expected = model.generate(input_ids=ids, **settings)
        assert torch.equal(merged.generate(input_ids=ids, **settings), expected)


def test_only_the_named_tensors_change(
    lora_run: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, _ = lora_run
    result = run(folder, MergeOptions(output=tmp_path / "out"), silent)
    source = bundled("bundled:tiny")
    assert source is not None
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.split(".")[-2] in LINEARS}
    assert result.proof is not None
    assert (result.proof.changed, result.proof.kept) == (28, 10)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_after_qlora_the_base_is_the_dequantised_one(
    qlora_run: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, trained = qlora_run
    options = MergeOptions(output=tmp_path / "out", save_dtype="float32")
    result = run(folder, options, silent)
    gap = (logits(load(tmp_path / "out")) - logits(trained)).abs()
    assert gap.mean() < 1e-5
    assert result.base.kind == "dequantized"
    assert result.base.tensors_dequantized == 28
    checked = result.verification
    assert checked is not None
    assert checked.base_gap is not None
    assert checked.merged.maximum < 1e-3
    assert checked.base_gap.mean > 100 * checked.merged.mean
    source = bundled("bundled:tiny")
    assert source is not None
    base, merged = load_file(source / "model.safetensors"), load(tmp_path / "out").state_dict()
    rest = [name for name in base if name.split(".")[-2] not in LINEARS]
    assert rest
    assert all(torch.equal(merged[name], base[name].float()) for name in rest)


def test_vllm_serves_on_another_base_after_qlora(
    qlora_run: tuple[Path, PreTrainedModel], lora_run: tuple[Path, PreTrainedModel]
) -> None:
    told = check_servable(find_adapter(qlora_run[0])).notes
    assert any("trained on a base in few bits" in note for note in told)
    assert check_servable(find_adapter(lora_run[0])).notes == ()


def test_after_qlora_the_original_base_on_request(
    qlora_run: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, trained = qlora_run
    told: list[str] = []
    options = MergeOptions(output=tmp_path / "out", save_dtype="float32", base="original")
    result = run(folder, options, told.append)
    source = bundled("bundled:tiny")
    expected = logits(PeftModel.from_pretrained(load(source), folder / "adapter"))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, atol=2e-5, rtol=0)
    assert (expected - logits(trained)).abs().mean() > 0.01
    assert result.base.tensors_dequantized == 0
    assert told[0] == (
        "base: bundled:tiny, original weights: as asked, although the adapter was trained on "
        "4-bit ones"
    )


def test_dequantised_base_of_another_program(
    qlora_run: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    """Without run.json the original base is the default, and NF4 is assumed when asked for."""
    folder, trained = qlora_run
    adapter = folder / "adapter"
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in adapter.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    base = {"base_model": "bundled:tiny", "save_dtype": "float32", "verify": False}
    plain = run(alone, MergeOptions(output=tmp_path / "plain", **base), silent)
    assert "nothing says" in plain.base.why
    asked = MergeOptions(output=tmp_path / "asked", base="dequantized", **base)
    result = run(alone, asked, silent)
    assert "not recorded" in result.base.why
    # Expanded to bfloat16 here, to float32 in that run.
    assert (logits(load(tmp_path / "asked")) - logits(trained)).abs().mean() < 0.02


def test_dequantised_base_of_a_16_bit_run(
    lora_run: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    options = MergeOptions(output=tmp_path / "out", base="dequantized")
    with pytest.raises(UsageError, match="trained on 16-bit weights"):
        run(lora_run[0], options, silent)


def test_a_model_that_is_not_base_and_adapter(
    lora_run: tuple[Path, PreTrainedModel],
) -> None:
    """The base alone, as a merge that lost the update would be."""
    folder, _ = lora_run
    source = bundled("bundled:tiny")
    assert source is not None
    config = AutoModelForCausalLM.from_pretrained(source).config
    adapter = find_adapter(folder)
    loaded = load_adapter(
        adapter, config, weight=1.0, device=torch.device("cpu"), allow_pickle=False
    )
    subject = Subject(
        merged=source,
        base=Base("bundled:tiny", None, source, None),
        adapters=[loaded],
        weights=[1.0],
        quantization=None,
        dequantized=False,
        save_dtype=torch.bfloat16,
        device=torch.device("cpu"),
        routed=False,
        pickle=False,
    )
    with pytest.raises(NumericalError, match="is not base \\+ adapter"):
        verify(subject, Prompts(tuple(token_ids()), "test"), silent)


def test_update_finer_than_the_saved_dtype(make_case: Callable[..., Any]) -> None:
    case = make_case("llama", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensor.mul_(0.005 if "lora_B" in name else 1.0)
    save_file(tensors, case.adapter / "adapter_model.safetensors")
    result = case.merge()
    assert result.precision.lost_share > 0.5
    assert "--save-dtype float32" in result.warnings[0]


def test_tokenizer_that_knows_more_than_the_embedding(make_case: Callable[..., Any]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    case = make_case("llama", config)
    AutoTokenizer.from_pretrained(bundled("bundled:tiny")).save_pretrained(case.adapter)
    rows = case.load_base().get_input_embeddings().weight.shape[0]
    result = case.merge(verify=False)
    assert any(f"knows 2048 tokens and the embedding has {rows} rows" in x for x in result.warnings)


def test_untrained_adapter(make_case: Callable[..., Any]) -> None:
    case = make_case("llama", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    zeroed = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    save_file(zeroed, case.adapter / "adapter_model.safetensors")
    result = case.merge()
    assert result.warnings == ("the adapter changes nothing: every update is zero",)
    base = read_safetensors(case.base / "model.safetensors")
    merged = read_safetensors(case.output / "model.safetensors")
    assert all(torch.equal(base[name].read(), merged[name].read()) for name in base)


def adapters(case: Any, tmp_path: Path) -> list[Path]:
    """Three adapters on the base of `case`: LoRA, rsLoRA and DoRA."""
    from peft import get_peft_model

    folders = []
    for place, values in enumerate(({}, {"use_rslora": True}, {"use_dora": True})):
        torch.manual_seed(place)
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **values)
        model = get_peft_model(case.load_base(), config)
        train_steps(model, steps=2)
        folders.append(tmp_path / f"adapter{place}")
        model.save_pretrained(str(folders[-1]))
    return folders


def merge_all(case: Any, folders: list[Path], weights: list[float], **values: Any) -> Any:
    named = tuple(map(WeightedAdapter, folders, weights))
    options = MergeOptions(
        output=case.output, base_model=str(case.base), adapters=named, overwrite=True, **values
    )
    return run(None, options, silent)


@pytest.mark.parametrize(
    ("chosen", "weights", "exact"),
    [
        ([0, 1], [1.0, 1.0], True),
        ([0, 1], [0.7, 0.3], True),
        ([1], [-0.5], True),
        ([0, 2], [0.5, 1.0], False),  # PEFT takes the first out of the weights and in again
    ],
)
def test_several_adapters(
    chosen: list[int],
    weights: list[float],
    exact: bool,
    make_case: Callable[..., Any],
    tmp_path: Path,
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    case = make_case("llama", config, dtype=torch.float32)
    folders = [adapters(case, tmp_path)[place] for place in chosen]
    result = merge_all(case, folders, weights)
    assert result.verification is not None
    model = PeftModel.from_pretrained(case.load_base(), folders[0], "x0")
    for place, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), f"x{place}")
    names = [f"x{place}" for place in range(len(folders))]
    for name, weight in zip(names, weights, strict=True):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(name, weight)
    expected = model.merge_and_unload(safe_merge=True, adapter_names=names).state_dict()
    found = case.loaded().state_dict()
    for name, tensor in expected.items():
        one_unit = 0.0 if exact else 2.0**-26  # in the last place of weights below 0.25
        torch.testing.assert_close(found[name], tensor, atol=one_unit, rtol=0)


def test_ties_and_dare(
    make_case: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    case = make_case("llama", config, dtype=torch.float32)
    folders = adapters(case, tmp_path)[:2]
    name = "model.layers.1.mlp.up_proj.weight"
    base = case.load_base().state_dict()[name]
    tasks = []
    for folder in folders:
        model = PeftModel.from_pretrained(case.load_base(), folder)
        tasks.append(model.merge_and_unload().state_dict()[name] - base)
    weights = torch.tensor([0.6, 0.4])
    result = merge_all(case, folders, weights.tolist(), combine="ties", density=0.4)
    expected = base + ties(tasks, weights, 0.4)
    torch.testing.assert_close(case.loaded().state_dict()[name], expected, atol=1e-7, rtol=0)
    assert "nothing serves ties unmerged" in str(result.not_verified)
    assert (result.combine, result.density) == ("ties", 0.4)
    assert "(ties, keeping 0.4 of each)" in (case.output / "README.md").read_text()
    show_merge(result, as_json=False)
    assert f"0.6 x {folders[0]} + 0.4 x {folders[1]}, ties, keeping 0.4" in capsys.readouterr().out
    for how in ("dare_linear", "dare_ties"):
        merge_all(case, folders, weights.tolist(), combine=how)
        once = case.loaded().state_dict()[name].clone()
        merge_all(case, folders, weights.tolist(), combine=how)
        assert torch.equal(case.loaded().state_dict()[name], once)
        share = (once != base).float().mean().item()
        assert 0.65 < share < 0.85  # each update keeps half of its values


def test_checkpoint_of_a_run(lora_run: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, _ = lora_run
    checkpoint = folder / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for file in (folder / "adapter").iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    result = run(checkpoint, MergeOptions(output=tmp_path / "out", verify=False), silent)
    assert result.base.name == "bundled:tiny"
    assert result.base.why == "the adapter was trained on them"


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", "gemma3", "opt"])
@pytest.mark.parametrize(
    ("kind", "double", "dtype"), [("nf4", True, "bfloat16"), ("fp4", False, "float32")]
)
def test_exactly_the_quantised_weights_are_dequantised(
    model_type: str, kind: str, double: bool, dtype: str, make_case: Callable[..., Any]
) -> None:
    """The truth is transformers' own quantised loading, expanded by transformers, with PEFT."""
    targets = ["c_attn"] if model_type == "gpt2" else ["q_proj"]
    case = make_case(model_type, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    method = {"name": "qlora", "quantization": kind, "double_quantization": double}
    values = {"model": str(case.base), "method": method, "data": {"train": "x"}, "output": "y"}
    recipe = Recipe.model_validate(values)
    manifest = {"status": "finished", "recipe": resolved(recipe), "device": {"dtype": dtype}}
    (case.adapter.parent / "run.json").write_text(json.dumps(manifest))
    result = case.merge(base_model=None, save_dtype="float32", verify=False)
    quantized = AutoModelForCausalLM.from_pretrained(
        case.base,
        dtype=getattr(torch, dtype),
        quantization_config=recipe.method.quantization_config("float32"),
    )
    count = sum(type(module).__name__ == "Linear4bit" for module in quantized.modules())
    expected = PeftModel.from_pretrained(quantized.dequantize().float(), case.adapter)
    torch.testing.assert_close(case.logits(), logits(expected), atol=2e-6, rtol=0)
    assert result.base.tensors_dequantized == count
    assert result.base.quantization == kind
