"""`peftcli merge` as a user meets it: exit codes, messages, and what is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from peftcli.bundled import bundled
from peftcli.cli import app
from peftcli.errors import NumericalError
from peftcli.merge.options import MergeOptions
from peftcli.merge.run import run

WEIGHTS = "adapter_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def case(make_case: Callable[..., Any]) -> Any:
    return make_case("llama", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))


def merge(case: Any, *more: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    words = ["merge", case.adapter, "--base-model", case.base, "--output", case.output, *more]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def change(case: Any, **values: Any) -> None:
    file = case.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def spoil(case: Any) -> None:
    tensors = load_file(case.adapter / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, case.adapter / WEIGHTS)


DAMAGE: dict[str, tuple[Callable[[Any], object], int, str]] = {
    "bottleneck": (lambda case: change(case, peft_type="BOTTLENECK"), 2, "cannot be merged"),
    "prompt": (lambda case: change(case, peft_type="PROMPT_TUNING"), 2, "a prompt is input"),
    "replication": (
        lambda case: change(case, layer_replication=[[0, 2]]),
        2,
        "layer_replication",
    ),
    "NaN": (spoil, 5, "NaN"),
    "pointer of the adapter": (
        lambda case: (case.adapter / WEIGHTS).write_text(POINTER),
        4,
        "git-lfs",
    ),
    "pointer of the base": (
        lambda case: (case.base / "model.safetensors").write_text(POINTER),
        4,
        "git-lfs",
    ),
    "no weights": (lambda case: (case.base / "model.safetensors").unlink(), 4, "neither"),
    "half of the weights": (
        lambda case: (case.base / "model.safetensors").write_bytes(
            (case.base / "model.safetensors").read_bytes()[:9000]
        ),
        4,
        "truncated",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_exit_codes(damage: str, case: Any) -> None:
    spoiled, code, word = DAMAGE[damage]
    spoiled(case)
    exit_code, said, complained = merge(case)
    assert (exit_code, said) == (code, "")
    errors = [line for line in complained.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert word in errors[0]
    assert "\nhint: " in complained
    assert {item.name for item in case.output.parent.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_output_that_is_an_input(place: str, case: Any) -> None:
    folder = case.base if place == "base" else case.adapter
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    exit_code, _, complained = merge(case, "--output", folder, "--overwrite")
    assert exit_code == 2
    assert "which is read" in complained
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_update_bias_without_a_bias(make_case: Callable[..., Any]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True)
    case = make_case("llama", config)
    exit_code, _, complained = merge(case)
    assert exit_code == 2
    assert "lora_bias" in complained
    assert "writing" not in complained


def test_merge_in_the_terminal_and_as_json(case: Any) -> None:
    exit_code, said, told = merge(case)
    assert exit_code == 0, told
    assert "writing" in told
    assert "are free" in told  # the sizes, before the first byte
    assert "original weights" in said
    assert "merged vs base + adapter" in said
    exit_code, said, _ = merge(case, "--overwrite", "--json", "--no-fp32")
    values = json.loads(said)
    assert values["arithmetic"] == "the base's dtype"
    assert values["precision"]["lost_share"] > 0
    assert values["verification"]["merged"]["top1_agreement"] > 0.9


def test_export_for_ollama(case: Any) -> None:
    exit_code, _, complained = merge(case, "--export", "ollama")
    assert exit_code == 4
    assert "no tokenizer in" in complained
    assert "writing" not in complained
    (case.base / "tokenizer.json").write_text("{}")
    exit_code, _, complained = merge(case, "--export", "ollama", "--no-verify")
    assert exit_code == 4
    assert "the tokenizer does not load" in complained
    assert not case.output.exists()
    source = bundled("bundled:tiny")
    assert source is not None
    AutoTokenizer.from_pretrained(source).save_pretrained(case.base)
    exit_code, said, complained = merge(case, "--export", "ollama", "--no-verify")
    assert exit_code == 0, complained
    assert "exported: Modelfile" in said
    lines = (case.output / "Modelfile").read_text()
    assert lines.startswith("FROM .\nTEMPLATE ")
    assert "PARAMETER stop " in lines


def test_export_for_vllm_writes_nothing(case: Any) -> None:
    words = ["merge", str(case.adapter), "--export", "vllm-lora"]
    before = set(case.adapter.parent.iterdir())
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert f"vllm serve BASE --enable-lora --lora-modules adapter={case.adapter}" in done.stdout
    change(case, use_dora=True)
    done = CliRunner().invoke(app, [*words, "--json"])
    assert (done.exit_code, json.loads(done.stdout)["servable"]) == (0, False)
    assert set(case.adapter.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--export", "vllm-lora"], "writes nothing, so --output has no use"),
        (["--density", "0.3"], "a linear merge keeps all of each update"),
        (["--combine", "ties"], "joins several adapters, and one is named"),
        (
            ["--combine", "ties", "--adapter", "ADAPTER", "--density", "7"],
            "--density 7: is a share",
        ),
        (
            ["--combine", "ties", "--adapter", "ADAPTER", "--density", "0"],
            "--density 0: is a share",
        ),
    ],
)
def test_options_without_effect_are_refused(more: list[str], word: str, case: Any) -> None:
    """One adapter under TIES lost half of its update, and nothing said so."""
    words = [str(case.adapter) if text == "ADAPTER" else text for text in more]
    exit_code, said, complained = merge(case, *words)
    assert (exit_code, said) == (2, "")
    assert word in complained
    assert not case.output.exists()


def test_vllm_is_asked_about_one_adapter(case: Any) -> None:
    words = ["merge", str(case.adapter), "--adapter", f"{case.adapter}:0.5"]
    done = CliRunner().invoke(app, [*words, "--export", "vllm-lora"])
    assert done.exit_code == 2
    assert "looks at one adapter, and 2 are named" in done.stderr


def test_prompts_are_refused_before_torch_is_imported(case: Any, tmp_path: Path) -> None:
    change(case, peft_type="PROMPT_TUNING")
    command = [sys.executable, "-X", "importtime", "-m", "peftcli", "merge", str(case.adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "peftcli.merge.refuse" in imported
    assert not {"torch", "transformers", "peft", "numpy"} & imported


@pytest.mark.parametrize(
    ("moment", "word"),
    [
        ("reading the written", "norm.weight differs from the base, and no update names it"),
        ("verifying: the merged", "is not base \\+ adapter"),
    ],
)
def test_weights_that_are_not_what_was_written(moment: str, word: str, case: Any) -> None:
    """A disk that does not keep what it was given, before each of the two checks."""

    def tell(text: str) -> None:
        if text.startswith(moment):
            file = case.output.with_name(".staging-merged") / "model.safetensors"
            tensors = load_file(file)
            tensors["model.norm.weight"] *= 1.5
            save_file(tensors, file, metadata={"format": "pt"})

    options = MergeOptions(output=case.output, base_model=str(case.base), verify=True)
    with pytest.raises(NumericalError, match=word) as caught:
        run(case.adapter, options, tell)
    assert caught.value.exit_code == 5
    assert {item.name for item in case.output.parent.iterdir()} == {"base", "adapter"}
