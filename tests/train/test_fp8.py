"""Runs on a base in fp8: they learn, resume, merge and are evaluated on the weights they had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftcli import fp8
from peftcli.adapters import load_adapter
from peftcli.errors import RecipeError, ResourceError, UsageError
from peftcli.estimate.gpus import find_gpu
from peftcli.estimate.run import run as estimate
from peftcli.evaluate.arms import groups_of
from peftcli.evaluate.arms import load as load_arms
from peftcli.evaluate.target import find_target
from peftcli.events import Evaluated, Event, Note
from peftcli.merge.options import MergeOptions
from peftcli.merge.run import run as merge
from peftcli.methods import VARIANTS, changed
from peftcli.models import Device
from peftcli.recipe.checks import check_architecture
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.train import checkpoints
from peftcli.train.precision import check_precision
from peftcli.train.run import Options, run

CPU = Device("cpu", "float32", "CPU", None)
STEPS = 24


def recipe(output: Path, quantization: str | None = "fp8", **sections: object) -> LoadedRecipe:
    values: dict[str, object] = {
        "model": "bundled:tiny",
        "method": {"name": "lora", "quantization": quantization},
        "data": {"train": "bundled:quickstart.train", "eval": "bundled:quickstart.eval"},
        "training": {
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "learning_rate": 2e-3,
            "device": "cpu",
        },
        "evaluation": {"steps": STEPS // 2},
        "output": str(output),
    }
    for name, section in sections.items():
        old = values.get(name)
        both = isinstance(old, dict) and isinstance(section, dict)
        values[name] = {**old, **section} if both else section
    return validate(Document("test.yaml", values))


def train(output: Path, quantization: str | None) -> list[Event]:
    events: list[Event] = []
    run(recipe(output, quantization), Options(), events.append)
    return events


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Event]]]:
    folder = tmp_path_factory.mktemp("fp8") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCLI_CACHE", str(folder.parent / "cache"))
        yield folder, train(folder, "fp8")


def held_out(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, Evaluated)]


@pytest.mark.slow
def test_held_out_loss_falls_as_it_does_on_16_bits(
    runs: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    """Within two hundredths of a nat per token, where both fall by more than eight nats."""
    folder, events = runs
    notes = [event.text for event in events if isinstance(event, Note)]
    assert "fused layers and loss, the base in fp8" in notes
    wide = held_out(train(tmp_path / "wide", None))
    for loss, other in zip(held_out(events), wide, strict=True):
        assert loss == pytest.approx(other, abs=0.02 * max(1.0, other))
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["recipe"]["method"]["quantization"] == "fp8"
    assert manifest["parameters"] == 2016960


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_never_stopped(
    runs: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(runs[0], again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints" / f"checkpoint-{STEPS}")
    manifest = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**manifest, "status": "running"}))
    assert checkpoints.steps(again / "checkpoints") == [STEPS // 2]
    with pytest.raises(UsageError, match=r"method\.quantization was fp8, is None"):
        run(recipe(again, None), Options(resume=True), lambda event: None)
    run(recipe(again), Options(resume=True), lambda event: None)
    file = Path("adapter") / "adapter_model.safetensors"
    assert (again / file).read_bytes() == (runs[0] / file).read_bytes()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits


@pytest.mark.slow
def test_merge_takes_the_rounded_base_and_proves_it(
    runs: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        Path(fp8.__file__).parent / "bundled" / "tiny", dtype=torch.float32
    )
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    rounded = {name: fp8.round_trip(layer.weight) for name, layer in fp8.frozen_linears(base)}
    for name, layer in fp8.frozen_linears(base):
        layer.weight.data = rounded[name]
    expected = logits(load_adapter(base, runs[0] / "adapter"))
    options = MergeOptions(output=tmp_path / "out", save_dtype="float32")
    told: list[str] = []
    result = merge(runs[0], options, told.append)
    assert told[0] == (
        "base: bundled:tiny, dequantized weights: the adapter was trained on fp8 weights, so it "
        "belongs to those"
    )
    assert (result.base.quantization, result.base.tensors_dequantized) == ("fp8", len(rounded))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=0)
    checked = result.verification
    assert checked is not None
    assert checked.base_gap is not None
    assert checked.base_gap.mean > 100 * checked.merged.mean
    merged = found.state_dict()
    same = [name for name in before if torch.equal(merged[name], before[name])]
    assert not {f"{name}.weight" for name in rounded} & set(same)
    assert len(same) == len(before) - len(rounded)


@pytest.mark.slow
def test_merge_on_the_original_weights_on_request(
    runs: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    told: list[str] = []
    options = MergeOptions(output=tmp_path / "out", base="original", verify=False)
    result = merge(runs[0], options, told.append)
    assert told[0].endswith("as asked, although the adapter was trained on fp8 ones")
    assert result.base.tensors_dequantized == 0


@pytest.mark.slow
def test_eval_loads_the_rounded_base(runs: tuple[Path, list[Event]]) -> None:
    (group,) = groups_of(find_target(runs[0]), CPU)
    assert group.arms[0].what == "bundled:tiny in fp8, computed in float32"
    base = AutoModelForCausalLM.from_pretrained(
        Path(fp8.__file__).parent / "bundled" / "tiny", dtype=torch.float32
    )
    own = dict(fp8.frozen_linears(base))
    loaded = load_arms(group, CPU).model.get_base_model()
    found = {name.removesuffix(".base_layer"): x for name, x in fp8.frozen_linears(loaded)}
    assert found.keys() == own.keys()
    for name, layer in own.items():
        assert torch.equal(found[name].weight, fp8.round_trip(layer.weight)), name


CLASHES = {
    "method.use_dora": {"method": {"use_dora": True}},
    "method.dropout": {"method": {"dropout": 0.1}},
    "method.bias": {"method": {"bias": "all"}},
    "method.modules_to_save": {"method": {"modules_to_save": ["lm_head"]}},
    "method.target_modules": {"method": {"target_modules": ["q_proj", "lm_head"]}},
    "training.kernels": {"training": {"kernels": "plain"}},
    "training.neftune_noise_alpha": {"training": {"neftune_noise_alpha": 5}},
    "model.attention": {"model": {"name": "bundled:tiny", "attention": "sdpa"}},
    "model.dtype": {"model": {"name": "bundled:tiny", "dtype": "float16"}},
}


@pytest.mark.parametrize("key", CLASHES)
def test_what_cannot_go_with_fp8_is_refused_at_its_place(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, **CLASHES[key])
    (line,) = caught.value.message.splitlines()
    assert f"{key}: " in line
    assert "quantization: fp8" in line
    assert caught.value.exit_code == 2
    recipe(tmp_path, None, **CLASHES[key])


def test_only_lora_takes_it(tmp_path: Path) -> None:
    for name in ("qlora", "adapter"):
        with pytest.raises(RecipeError, match="quantization"):
            recipe(tmp_path, method={"name": name})


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("google/gemma-2-9b", "fp8 runs on llama, mistral, phi3, qwen2, qwen3 models"),
        ("Qwen/Qwen3-8B", None),
    ],
)
def test_models_without_fused_layers_are_refused_by_their_config(
    tmp_path: Path, model: str, why: str | None
) -> None:
    from peftcli.architecture.catalog import find_model

    architecture = find_model(model)
    assert architecture is not None
    loaded = recipe(tmp_path, model=model)
    if why is None:
        check_architecture(loaded, architecture)
        return
    with pytest.raises(RecipeError, match=why):
        check_architecture(loaded, architecture)


def test_cards_without_it_are_refused_and_a_cpu_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recipe(tmp_path).recipe
    check_precision(found, CPU)
    card = Device("cuda", "bfloat16", "NVIDIA A100", 80.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    with pytest.raises(ResourceError, match=r"needs compute capability 8\.9 .* has 8\.0") as caught:
        check_precision(found, card)
    assert caught.value.exit_code == 3
    assert "qlora" in caught.value.hint
    check_precision(recipe(tmp_path, None).recipe, card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    check_precision(found, card)


def test_other_methods_take_over_what_they_can(tmp_path: Path) -> None:
    method = recipe(tmp_path, method={"rank": 8}).recipe.method
    for keys in VARIANTS.values():
        other = changed(method, keys)
        assert other.name == keys["name"]
    assert changed(method, {"name": "qlora"}).model_dump()["quantization"] == "nf4"
    four = changed(changed(method, {"name": "qlora"}), {"quantization": "fp4"})
    assert changed(four, {"name": "lora"}).model_dump()["quantization"] is None
    assert changed(four, {"name": "adapter"}).model_dump()["quantization"] == "fp4"
    thrift = method.thriftier()[0]
    assert changed(method, thrift.keys).model_dump()["quantization"] == "nf4"


def test_the_estimate_counts_a_byte_a_weight_and_four_a_row(tmp_path: Path) -> None:
    values = {"model": "meta-llama/Llama-3.1-8B"}
    card, old = find_gpu("h100"), find_gpu("a100")
    eight = estimate(recipe(tmp_path, **values).recipe, card)
    sixteen = estimate(recipe(tmp_path, None, **values).recipe, card)
    elements = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    saved = (sixteen.memory.base_gib - eight.memory.base_gib) * 2**30
    assert saved == pytest.approx(elements - 4 * rows, rel=1e-9)
    assert sixteen.memory.loading_gib == sixteen.memory.base_gib
    assert eight.memory.loading_gib == pytest.approx(15.328, abs=0.001)  # as it was measured
    assert not [note for note in eight.notes if "fp8" in note]
    notes = estimate(recipe(tmp_path, **values).recipe, old).notes
    assert any("does not multiply in fp8" in note for note in notes)


@pytest.mark.gpu
def test_runs_on_a_gpu_end_where_those_in_16_bits_end(tmp_path: Path) -> None:
    """On average over three seeds: so early two runs differ by more than fp8 costs."""
    ends: dict[str | None, list[float]] = {"fp8": [], None: []}
    for seed in (1, 2, 3):
        for quantization, found in ends.items():
            events: list[Event] = []
            folder = tmp_path / f"{quantization}-{seed}"
            loaded = recipe(folder, quantization, training={"device": "cuda"}, seed=seed)
            run(loaded, Options(), events.append)
            found.append(held_out(events)[-1])
    assert fmean(ends["fp8"]) == pytest.approx(fmean(ends[None]), rel=0.03), ends
    tensors = load_file(tmp_path / "fp8-1" / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
