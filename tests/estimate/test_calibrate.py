"""The script that measures, on tiny models of real families and without a GPU."""

from __future__ import annotations

import json
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Done, script, server
from tiny_models import tiny_config

from peftcli.models import Device
from peftcli.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "calibrate"


def calibrate(*arguments: str) -> Done:
    return server().run("--device", "cpu", *arguments, program=script(SCRIPT))


def load() -> Any:
    """The script as a module."""
    loader = SourceFileLoader("calibrate", str(SCRIPT))
    spec = spec_from_loader("calibrate", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["calibrate"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    tiny_config("llama").save_pretrained(folder)
    return folder


def grid(folder: Path, *lines: str) -> Path:
    file = folder / "grid"
    file.write_text("\n".join(lines) + "\n")
    return file


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_real_steps_are_measured_and_a_stopped_run_goes_on(model: Path, tmp_path: Path) -> None:
    lines = [
        f"{model} qlora 32x2 full r=4 pack",
        f"{model} full 16x2 none opt=adafactor acc=2",
        f"{model} dora 32x1 none r=4 drop=0.1 qv",
        f"{model} lora 32x2 offload acc=2",
    ]
    out = tmp_path / "found" / "measurements.jsonl"
    options = ("--out", str(out), "--grid", str(grid(tmp_path, *lines)), "--steps", "2")
    options += ("--seconds", "0")
    first = calibrate(*options, "--only", "qlora")
    assert first.returncode == 0, first.stderr
    found = records(out)
    assert [record["case"] for record in found] == lines[:1]
    measured = found[0]["measured"]
    assert measured["steps"] == 2
    assert measured["step_seconds"] > 0
    assert measured["loss"] > 1  # random weights know nothing
    assert measured["peak_gib"] is None  # only a GPU has one
    assert found[0]["predicted"]["peak_gib"] > 0
    assert found[0]["recipe"]["training"]["packing"] is True
    again = calibrate(*options, "--resume")
    assert again.returncode == 0, again.stderr
    assert lines[0] not in again.stdout
    assert {record["case"] for record in records(out)} == set(lines)
    assert "step_seconds" in again.stdout


def test_the_fastest_of_several_rounds_is_kept_of_a_short_step(model: Path, tmp_path: Path) -> None:
    lines = [f"{model} lora 16x1 none", f"{model} adapter 16x1 none m=4"]
    out = tmp_path / "m.jsonl"
    options = ("--out", str(out), "--grid", str(grid(tmp_path, *lines)), "--seconds", "0")
    assert calibrate(*options, "--only", "lora").returncode == 0
    (first,) = records(out)
    assert first["quiet"] is True  # the only one, so far
    assert first["launching_seconds"] > 0

    def again(seconds: float, launching: float) -> tuple[Done, dict[str, dict[str, Any]]]:
        measured = first["measured"] | {"step_seconds": seconds}
        old = first | {"measured": measured, "launching_seconds": launching, "quiet": False}
        out.write_text(json.dumps(old) + "\n")
        done = calibrate(*options, "--resume", "--rounds", "2")
        assert done.returncode == 0, done.stderr
        return done, {record["case"]: record for record in records(out)}

    done, found = again(1e6, 1e6)
    assert done.stdout.count(f"{lines[0]} ") == 1
    assert found[lines[0]]["measured"]["step_seconds"] < 1e6
    assert found[lines[0]]["launching_seconds"] < 1e6
    assert found[lines[0]]["rounds"] == 2
    _, found = again(0.0, 1e6)
    assert found[lines[0]]["measured"]["step_seconds"] == 0.0  # the fastest is kept
    done, found = again(0.0, 1e-9)  # nothing is as quiet as that was
    assert [done.stdout.count(f"{line} ") for line in lines] == [1, 2]
    assert [found[line]["quiet"] for line in lines] == [True, False]


def test_a_run_is_quiet_where_kernels_started_nearly_as_fast_as_ever() -> None:
    seconds = {"a": 1.0, "b": 1.14, "c": 1.16}
    found = [{"case": case, "launching_seconds": x} for case, x in seconds.items()]
    old = {"case": "of before", "quiet": True}
    load().mark_quiet([*found, old])
    assert [record["quiet"] for record in found] == [True, True, False]
    assert old == {"case": "of before", "quiet": True}


def test_a_second_run_that_fails_does_not_take_the_place_of_the_first() -> None:
    faster = load()._faster
    slow, fast = (
        {"measured": {"step_seconds": seconds}, "launching_seconds": seconds}
        for seconds in (2.0, 1.0)
    )
    failed = {"measured": None, "failed": "out of memory", "launching_seconds": 0.5}
    assert faster(slow, fast) == faster(fast, slow) == fast
    assert faster(slow, failed) is faster(failed, slow) is faster(None, slow) is slow


def test_cases_are_drawn_at_random_but_the_same_for_the_same_seed() -> None:
    module = load()
    held = module.HELD_OUT.split("\n")[1:-1]
    lines = module.drawn(150, 20261128)
    lines += [line for line in module.drawn(150, 20261129) if line.split()[1] == "full"]
    assert held == [line for line in dict.fromkeys(lines) if line in held]
    other = module.drawn(20, 7)
    assert len(set(other)) == 20
    assert not set(other) & set(module.GRID.splitlines())
    for line in other:
        assert module.recipe_of(line).data.max_length >= 512


def test_a_budget_of_seconds_is_kept(model: Path, tmp_path: Path) -> None:
    file = grid(tmp_path, f"{model} lora 16x1 none")
    out = tmp_path / "m.jsonl"
    done = calibrate("--out", str(out), "--grid", str(file), "--budget-seconds", "1")
    assert done.returncode == 0, done.stderr
    assert "no time left" in done.stdout
    assert not out.exists()


def test_the_grid_covers_what_it_should() -> None:
    found = list(load().cases())
    assert len({case.name for case in found}) == len(found) >= 60
    held = sum(case.held_out for case in found)
    assert held >= len(found) / 3
    recipes: list[Recipe] = [case.recipe for case in found]
    assert len({recipe.model.name for recipe in recipes}) >= 5
    assert {recipe.method.name for recipe in recipes} == {"lora", "qlora", "adapter", "full"}
    lengths = [recipe.data.max_length for recipe in recipes]
    assert (min(lengths), max(lengths)) == (512, 32768)
    rows = [recipe.training.micro_batch_size for recipe in recipes]
    assert (min(rows), max(rows)) == (1, 16)
    modes = {recipe.training.checkpointing for recipe in recipes}
    assert {mode for mode in modes if isinstance(mode, str)} == {"none", "full", "offload"}
    assert any(isinstance(mode, int) for mode in modes)
    assert {recipe.training.packing for recipe in recipes} == {True, False}
    assert len({recipe.optimizer for recipe in recipes}) >= 5
    ranks = {getattr(recipe.method, "rank", 16) for recipe in recipes}
    assert (min(ranks), max(ranks)) == (8, 256)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("four_bits", [False, True])
def test_a_random_base_is_what_the_loader_makes_of_a_checkpoint(
    family: str, four_bits: bool
) -> None:
    calibrate = load()
    device = Device("cpu", "float32", "CPU", None)
    method = {"name": "qlora" if four_bits else "lora"}
    recipe = Recipe.model_validate(
        {"model": "m", "method": method, "data": {"train": "r"}, "output": "o"}
    )
    quantization = recipe.method.quantization_config("float32")
    config = tiny_config(family)
    made = calibrate.random_base(config, device, quantization, None)
    linears = {type(x).__name__ for n, x in made.named_modules() if n.endswith("q_proj")}
    assert linears == ({"Linear4bit"} if four_bits else {"Linear"})
    with torch.no_grad():
        logits = made(input_ids=torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    tied = made.get_output_embeddings().weight is made.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings
