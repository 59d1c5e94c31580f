"""What does not belong together is refused with one clear error, and nothing is published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peftcli.errors import (
    ArtefactError,
    ExitCode,
    NumericalError,
    PeftcliError,
    ResourceError,
    UsageError,
)
from peftcli.fingerprint import FILE_NAME, fingerprint
from peftcli.merge.options import MergeOptions, parse_adapter
from peftcli.merge.refuse import check_mergeable
from peftcli.merge.run import run
from peftcli.run_dir import RunDir, locked

WEIGHTS = "adapter_model.safetensors"


def config(**values: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": "all-linear", **values})


@pytest.fixture
def case(make_case: Callable[..., Any]) -> Any:
    made = make_case("llama", config(), shards="60KB")
    (made.adapter / FILE_NAME).write_text(fingerprint(made.base).to_json())
    return made


def refused(case: Any, kind: type[PeftcliError], match: str, **options: Any) -> PeftcliError:
    """The error of a merge, after checking that it left nothing and changed no input."""
    before = _bytes(case.base), _bytes(case.adapter)
    with pytest.raises(kind, match=match) as caught:
        case.merge(**options)
    assert (_bytes(case.base), _bytes(case.adapter)) == before
    assert [item for item in case.output.parent.iterdir() if "merged" in item.name] == []
    assert caught.value.hint
    return caught.value


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def another_base(folder: Path, dtype: torch.dtype = torch.bfloat16, **values: Any) -> None:
    settings = tiny_config("llama")
    for key, value in values.items():
        setattr(settings, key, value)
    shutil.rmtree(folder)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(settings, dtype=dtype).save_pretrained(folder)


def test_another_base_of_the_same_shape(case: Any) -> None:
    another_base(case.base)
    error = refused(case, ArtefactError, "is not the base that")
    assert error.exit_code == ExitCode.ARTEFACT == 4


def test_after_training_on_a_quantised_checkpoint_the_named_base_is_taken(
    case: Any, tmp_path: Path
) -> None:
    """Its fingerprint is of the quantised weights, which no 16-bit model has."""
    stored = tmp_path / "stored"
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        case.base, quantization_config=nf4, device_map="cpu"
    ).save_pretrained(stored)
    change_config(case.adapter, base_model_name_or_path=str(stored))
    (case.adapter / FILE_NAME).write_text(json.dumps(vars(fingerprint(stored))))
    refused(case, ArtefactError, "its weights are quantised", base_model=str(stored))
    result = case.merge(base_model=str(case.base))
    assert result.base.kind == "original"
    assert any("stored quantised" in text for text in result.warnings)


def test_an_already_merged_base(case: Any) -> None:
    case.merge(verify=False)
    merged = case.output.rename(case.output.with_name("again"))
    refused(case, ArtefactError, "merged into it already", base_model=str(merged))


def test_an_already_merged_base_by_another_program(case: Any) -> None:
    case.merge(verify=False)
    merged = case.output.rename(case.output.with_name("again"))
    (merged / "merge.json").unlink()
    refused(case, ArtefactError, "is not the base that", base_model=str(merged))


@pytest.mark.parametrize("layers", [1, 4])
def test_another_depth_without_a_fingerprint(case: Any, layers: int) -> None:
    (case.adapter / FILE_NAME).unlink()
    another_base(case.base, num_hidden_layers=layers, layer_types=None)
    refused(case, ArtefactError, "shallower model" if layers == 4 else "has, and its config")


def test_another_architecture(case: Any) -> None:
    (case.adapter / FILE_NAME).unlink()
    shutil.rmtree(case.base)
    tiny_model("gpt2").save_pretrained(case.base)
    refused(case, ArtefactError, "does not belong to this base")


def test_another_width(case: Any) -> None:
    (case.adapter / FILE_NAME).unlink()
    another_base(case.base, intermediate_size=96)
    refused(case, ArtefactError, r"\(.*\), and \(.*\) on this base")


def test_missing_and_unexpected_tensors(case: Any) -> None:
    kept = (case.adapter / WEIGHTS).read_bytes()
    change_tensors(case.adapter, lambda tensors: tensors.pop(next(iter(tensors))))
    refused(case, ArtefactError, "lacks 1 tensors")
    (case.adapter / WEIGHTS).write_bytes(kept)
    change_config(case.adapter, target_modules=["q_proj"])
    refused(case, ArtefactError, "has, and its configuration does not, 24 tensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(case: Any, value: float) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).view(-1)[3] = value

    change_tensors(case.adapter, plant)
    error = refused(case, NumericalError, "1 of 28 tensors hold NaN or infinite")
    assert error.exit_code == ExitCode.NUMERICAL == 5


def test_result_beyond_the_saved_dtype(case: Any) -> None:
    change_tensors(case.adapter, lambda tensors: [t.fill_(300.0) for t in tensors.values()])
    refused(case, NumericalError, "not finite in torch.float16", save_dtype="float16")


@pytest.mark.parametrize("damage", ["missing", "truncated", "pointer", "index", "header"])
def test_damaged_base(case: Any, damage: str) -> None:
    (case.adapter / FILE_NAME).unlink()
    shard = sorted(case.base.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif damage == "index":
        (case.base / "model.safetensors.index.json").write_text('{"weight_map": [')
    else:
        shard.write_bytes(data.replace(b'"shape":[64,64]', b'"shape":[64,65]', 1))
    found = {
        "missing": "weight files are missing: model-00002",
        "truncated": "truncated",
        "pointer": "git-lfs pointer",
        "index": "damaged",
        "header": "header is corrupt",
    }
    refused(case, ArtefactError, found[damage])
    if damage == "missing":
        shard.write_bytes(data)
        case.merge(verify=False)
        assert case.output.exists()


def test_config_of_another_vocabulary(case: Any) -> None:
    (case.adapter / FILE_NAME).unlink()
    file = case.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 136}))
    refused(case, ArtefactError, r"\(128, 64\), and \(136, 64\) by config.json")


def test_config_of_fewer_experts(make_case: Callable[..., Any]) -> None:
    case = make_case("qwen3_moe", config(target_modules=["q_proj"]))
    file = case.base / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_experts": 3, "num_local_experts": 3}))
    refused(case, ArtefactError, "by config.json")


def test_base_without_one_expert(make_case: Callable[..., Any]) -> None:
    case = make_case("qwen3_moe", config(target_modules=["q_proj"]))
    tensors = load_file(case.base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "0.mlp.experts.3.up" not in name}
    save_file(kept, case.base / "model.safetensors", metadata={"format": "pt"})
    refused(case, ArtefactError, "lacks 1 tensors")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_base(case: Any, method: str) -> None:
    file = case.base / "config.json"
    values = json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps(values))
    assert "16-bit" in refused(case, ArtefactError, f"quantised \\({method}\\)").hint


@pytest.mark.parametrize("place", ["base", "adapter", "above", "inside", "foreign", "file"])
def test_output_that_is_not_free(case: Any, place: str) -> None:
    folder = case.output.parent
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    outputs = {
        "base": case.base,
        "adapter": case.adapter,
        "above": folder,
        "inside": case.base / "new",
        "foreign": folder / "notes",
        "file": folder / "notes" / "a.txt",
    }
    error = refused(case, UsageError, "--output", output=outputs[place], overwrite=True)
    assert error.exit_code == ExitCode.USAGE == 2
    assert (folder / "notes" / "a.txt").read_text() == "mine"


def test_output_that_cannot_be_put_in_place(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell would stay in a folder that is gone, and a mount point cannot be renamed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place, match in (
        (Path(), "--output .: is or holds the folder you are in"),
        (Path("/proc"), "--output /proc: is a mount point"),
    ):
        with pytest.raises(UsageError, match=match) as caught:
            case.merge(output=place)
        assert caught.value.hint.endswith(f"--output {place / 'merged'}")


def test_output_that_is_a_link_to_another_disk(case: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    case.merge(output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "merge.json").is_file()


def test_output_that_is_a_merged_model(case: Any) -> None:
    case.merge(verify=False)
    with pytest.raises(UsageError, match="holds a merged model") as caught:
        case.merge(verify=False)
    assert "--overwrite" in caught.value.hint
    (case.output / "old").write_text("")
    case.merge(verify=False, overwrite=True)
    assert not (case.output / "old").exists()


def test_output_in_use(case: Any) -> None:
    staging = case.output.with_name(".staging-merged")
    staging.mkdir()
    with locked(RunDir(staging)), pytest.raises(ResourceError, match="in use by process"):
        case.merge(verify=False)
    assert staging.exists()
    case.merge(verify=False)
    assert not staging.exists()


@pytest.mark.parametrize(
    ("values", "kind", "match"),
    [
        ({"peft_type": "BOTTLENECK"}, UsageError, "cannot be merged: bottleneck"),
        ({"peft_type": "PROMPT_TUNING"}, UsageError, "a prompt is input"),
        ({"peft_type": "VERA"}, UsageError, "not known here"),
        ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, UsageError, "task SEQ_CLS"),
        ({"layer_replication": [[0, 2], [1, 2]]}, UsageError, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, UsageError, "some tokens only"),
        ({"init_lora_weights": "pissa_niter_4"}, UsageError, "rewrote the base"),
        ({"lora_alpha": float("nan")}, ArtefactError, "lora_alpha: nan"),
        ({"r": 10**9}, ArtefactError, "r: 1000000000"),
        ({"r": True}, ArtefactError, "r: True"),
        ({"rank_pattern": {"q_proj": -1}}, ArtefactError, "rank_pattern.q_proj: -1"),
        ({"megatron_core": "evil.core"}, ArtefactError, "evil.core"),
        ({"auto_mapping": {"parent_library": "evil"}}, ArtefactError, "`evil`"),
    ],
)
def test_refused_by_configuration(
    case: Any, values: dict[str, Any], kind: type[PeftcliError], match: str
) -> None:
    change_config(case.adapter, **values)
    with pytest.raises(kind, match=match) as caught:
        check_mergeable(case.adapter)
    assert caught.value.hint


def test_refusal_needs_no_torch(case: Any) -> None:
    change_config(case.adapter, peft_type="BOTTLENECK")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from peftcli.errors import UsageError\n"
        "from peftcli.merge import options, result, servable, show\n"
        "from peftcli.merge.refuse import check_mergeable\n"
        "try:\n"
        f"    check_mergeable(Path({str(case.adapter)!r}))\n"
        "except UsageError:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'numpy', 'safetensors', 'rich'}\n"
        "    sys.exit(bool(heavy & set(sys.modules)))\n"
        "sys.exit(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_update_bias_without_a_bias(make_case: Callable[..., Any]) -> None:
    case = make_case("llama", config(target_modules=["q_proj"], lora_bias=True))
    refused(case, UsageError, "has no bias in the base")


def test_unknown_field_is_told(case: Any) -> None:
    change_config(case.adapter, from_the_future=1)
    result = case.merge(verify=False)
    assert result.warnings == (
        f"{case.adapter}: adapter_config.json has fields that are not known: ['from_the_future']",
    )


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_pickles_only_when_allowed(case: Any, what: str) -> None:
    (case.adapter / FILE_NAME).unlink()
    expected = case.by_peft()
    if what == "adapter":
        torch.save(load_file(case.adapter / WEIGHTS), case.adapter / "adapter_model.bin")
        (case.adapter / WEIGHTS).unlink()
    else:
        tensors: dict[str, torch.Tensor] = {}
        for shard in case.base.glob("*.safetensors"):
            tensors |= load_file(shard)
            shard.unlink()
        (case.base / "model.safetensors.index.json").unlink()
        torch.save(tensors, case.base / "pytorch_model.bin")
    error = refused(case, ArtefactError, "pickle")
    assert "--allow-pickle" in error.hint
    case.merge(allow_pickle=True)
    found = case.loaded().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pickles_in_several_files(case: Any) -> None:
    (case.adapter / FILE_NAME).unlink()
    expected = case.by_peft()
    index = case.base / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    for shard in case.base.glob("*.safetensors"):
        torch.save(load_file(shard), case.base / _pickled(shard.name))
        shard.unlink()
    names["weight_map"] = {name: _pickled(file) for name, file in names["weight_map"].items()}
    (case.base / "pytorch_model.bin.index.json").write_text(json.dumps(names))
    index.unlink()
    refused(case, ArtefactError, "pickles")
    case.merge(allow_pickle=True)
    found = case.loaded().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(case.output.glob("*.bin*"))


def _pickled(name: str) -> str:
    return name.replace("model", "pytorch_model").replace(".safetensors", ".bin")


def test_base_and_adapter_from_the_hub(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both lie in the hub's cache, as a download leaves them; the result goes elsewhere."""
    expected = case.by_peft()
    change_config(case.adapter, base_model_name_or_path="someone/base")
    for folder, name in ((case.base, "base"), (case.adapter, "adapter")):
        cached = tmp_path / "hub" / f"models--someone--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("c0ffee")
        (cached / "snapshots").mkdir()
        folder.rename(cached / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = MergeOptions(output=case.output, offline=True)
    result = run(Path("someone/adapter"), options, lambda text: None)
    assert (result.base.name, result.base.commit) == ("someone/base", "c0ffee")
    card = (case.output / "README.md").read_text()
    assert "base_model: someone/base" in card
    assert "`someone/base` at commit c0ffee" in card
    found = case.loaded().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(UsageError, match="someone/other: no such folder, and the hub"):
        run(Path("someone/other"), options, lambda text: None)


def test_planted_pickle(case: Any, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            import os

            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"x": Planted()}, case.adapter / "adapter_model.bin")
    (case.adapter / WEIGHTS).unlink()
    error = refused(case, ArtefactError, "not a plain file of tensors", allow_pickle=True)
    assert not (tmp_path / "executed").exists()
    assert "weights_only" not in error.message + error.hint


def test_sources_that_are_none(case: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(case.adapter, tmp_path / "nested" / "checkpoint-5")
    for source, match in (
        (tmp_path / "nothing", "no such folder"),
        (case.base, "a whole model, not an adapter"),
        (tmp_path / "nested", "no adapter itself; those in it are checkpoint-5"),
        (tmp_path / "empty", "holds neither run.json nor"),
    ):
        with pytest.raises(UsageError, match=match):
            run(source, MergeOptions(), lambda text: None)
    with pytest.raises(UsageError, match="nothing to merge"):
        run(None, MergeOptions(), lambda text: None)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [("a", "a", 1.0), ("a/b:0.5", "a/b", 0.5), ("a:-1", "a", -1.0), ("c:/a", "c:/a", 1.0)],
)
def test_weighted_adapter(text: str, path: str, weight: float) -> None:
    found = parse_adapter(text)
    assert (str(found.path), found.weight) == (path, weight)


@pytest.mark.parametrize("text", ["a:x", "a:nan", "a:"])
def test_weight_that_is_no_number(text: str) -> None:
    with pytest.raises(UsageError, match="is no number"):
        parse_adapter(text)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_home_folder_that_nobody_has(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case("llama", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="~nobody-here/a/base: no such folder"):
        run(
            case.adapter,
            MergeOptions(base_model="~nobody-here/a/base", output=tmp_path / "merged"),
            print,
        )
