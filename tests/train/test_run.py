"""Runs of every method on a real tiny model: what is trained, saved, refused and repeated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel

from peftcli.adapters import load_adapter
from peftcli.errors import ArtefactError, NumericalError, RecipeError, ResourceError, UsageError
from peftcli.events import Evaluated, Event, Note, Step, Warned
from peftcli.fingerprint import check_same_base, fingerprint, read_fingerprint
from peftcli.models import Device, load_base
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, load_recipe, validate
from peftcli.recipe.schema import Model
from peftcli.train.run import Options, TrainResult, run

CPU = Device("cpu", "float32", "CPU", None)
Train = Callable[..., TrainResult]


def recipe(base: Path, rows: Path, output: Path, **sections: object) -> LoadedRecipe:
    values: dict[str, object] = {
        "model": str(base),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(rows), "eval": 0.2, "max_length": 64},
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2},
        "output": str(output),
    }
    for name, section in sections.items():
        old = values.get(name)
        both = isinstance(old, dict) and isinstance(section, dict) and name != "method"
        values[name] = {**old, **section} if both else section
    return validate(Document("test.yaml", values))


@pytest.fixture
def train(base_model: Path, rows: Path, tmp_path: Path) -> Train:
    def start(
        options: Options | None = None, events: list[Event] | None = None, **sections: object
    ) -> TrainResult:
        loaded = recipe(base_model, rows, tmp_path / "run", **sections)
        tell = (events if events is not None else []).append
        return run(loaded, options or Options(), tell)

    return start


METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "use_dora": True},
    "eva": {"name": "lora", "rank": 4, "init": "eva"},
    "qlora": {"name": "qlora", "rank": 4},
    "houlsby": {"name": "adapter", "bottleneck_size": 8},
    "pfeiffer nf4": {"name": "adapter", "placement": "pfeiffer", "quantization": "nf4"},
    "parallel": {"name": "adapter", "placement": "parallel", "scaling": 4},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_adapter_method_learns_and_its_folder_loads(
    train: Train, base_model: Path, method: dict[str, object]
) -> None:
    events: list[Event] = []
    result = train(method=method, training={"max_steps": 8}, events=events)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert result.result.name == "adapter"
    model = load_adapter(load_base(Model(name=str(base_model)), CPU), result.result)
    ids = torch.tensor([[1, 4, 20, 21, 22, 6]])
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    assert not torch.equal(tuned, base)
    manifest = json.loads((result.output / "run.json").read_text())
    assert manifest["trainable_parameters"] == result.trainable_parameters


def test_full_fine_tuning_leaves_a_model(train: Train, base_model: Path) -> None:
    result = train(method="full", training={"learning_rate": 1e-3})
    tuned = AutoModelForCausalLM.from_pretrained(result.result)
    before = load_file(base_model / "model.safetensors")
    after = dict(tuned.state_dict())
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert tuned.config.use_cache is True


def test_the_run_folder_holds_what_the_design_promises(train: Train, base_model: Path) -> None:
    result = train()
    names = {path.name for path in result.output.iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "adapter"} <= names
    assert not [name for name in names if name.startswith(".staging")]
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    manifest = json.loads((result.output / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["base"]["fingerprint"]["digest"] == fingerprint(base_model).digest
    assert manifest["data"]["files"][0]["sha256"]
    assert manifest["plan"]["steps"] == 4
    tokenizer = AutoTokenizer.from_pretrained(result.result)
    assert tokenizer.chat_template
    stops = json.loads((result.result / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|end|>") in stops
    modes = {file.stat().st_mode & 0o777 for file in result.result.iterdir()}
    assert modes == {0o644}
    assert not list(result.output.rglob("training_args.bin"))


def test_the_written_recipe_trains_the_same_again(base_model: Path, rows: Path, tmp_path: Path):
    """The default row length is above this model's positions, as it is for the quickstart's."""
    values = {"model": str(base_model), "method": "lora", "data": {"train": str(rows)}}
    values |= {"training": {"max_steps": 2}, "output": str(tmp_path / "run")}
    first = run(validate(Document("test.yaml", values)), Options(), print)
    written = load_recipe(first.output / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    assert written.recipe.data.max_length == 256
    second = run(written, Options(), print)
    same = [(x.result / "adapter_model.safetensors").read_bytes() for x in (first, second)]
    assert same[0] == same[1]


@pytest.mark.parametrize("name", ["lora", "qlora", "houlsby"])
def test_fused_and_plain_steps_learn_the_same(train: Train, name: str) -> None:
    curves = []
    for kernels in ("auto", "plain"):
        events: list[Event] = []
        train(
            method=METHODS[name],
            training={"max_steps": 25, "kernels": kernels},
            options=Options(overwrite=True),
            events=events,
        )
        wanted = "fused" if kernels == "auto" else "plain"
        assert any(isinstance(e, Note) and e.text.startswith(wanted) for e in events)
        curves.append([event.loss for event in events if isinstance(event, Step)])
    assert curves[0][-1] < 0.95 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)


def test_the_loss_of_a_router_does_not_depend_on_the_micro_batch(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    config = tiny_config("qwen3_moe")
    config.vocab_size, config.router_aux_loss_coef = 288, 0.1
    torch.manual_seed(0)
    moe = tmp_path / "moe"
    shutil.copytree(base_model, moe)
    (moe / "config.json").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(moe)
    found = []
    for micro in (8, 2):
        events: list[Event] = []
        training = {"max_steps": 2, "micro_batch_size": micro}
        loaded = recipe(moe, rows, tmp_path / f"run{micro}", training=training)
        run(loaded, Options(), events.append)
        found.append([event.loss for event in events if isinstance(event, Step)])
    # The balance of the experts is judged in each micro-batch, so it is near, not the same.
    assert found[0] == pytest.approx(found[1], rel=5e-3)


def test_held_out_rows_go_as_many_at_a_time_as_asked(train: Train) -> None:
    passes: list[int] = []
    calls: list[bool] = []

    def count(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, LlamaModel):
            calls.append(torch.is_grad_enabled())

    hook = register_module_forward_pre_hook(count)
    for size in (1, 8):
        calls.clear()
        train(
            training={"max_steps": 1, "micro_batch_size": 1},
            evaluation={"batch_size": size, "steps": 1},
            options=Options(overwrite=True),
        )
        passes.append(calls.count(False))
    hook.remove()
    assert passes == [8, 1]


def test_dropout_is_active_from_the_first_step(train: Train) -> None:
    curves = []
    for dropout in (0.0, 0.5):
        events: list[Event] = []
        method = {"name": "lora", "rank": 4, "dropout": dropout}
        train(method=method, options=Options(overwrite=True), events=events)
        curves.append([event.grad_norm for event in events if isinstance(event, Step)])
    assert curves[0][0] != pytest.approx(curves[1][0], rel=1e-3)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_checkpointing_keeps_less_and_learns_the_same(train: Train, kernels: str) -> None:
    """What autograd keeps is counted where it keeps it; layers must really be computed again."""
    kept, losses = {}, {}
    for mode in ("none", "full"):
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        events: list[Event] = []
        training = {"max_steps": 2, "checkpointing": mode, "kernels": kernels}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            train(training=training, options=Options(overwrite=True), events=events)
        kept[mode] = sum(sizes)
        losses[mode] = [event.loss for event in events if isinstance(event, Step)]
    assert losses["full"] == pytest.approx(losses["none"], rel=1e-6)
    assert kept["full"] < 0.8 * kept["none"]


def test_4_bit_weights_that_a_cpu_misreads_are_told(train: Train) -> None:
    """The down_proj of this model takes 96 values, one and a half blocks of 4-bit weights."""
    for method, told in (("qlora", 1), ("lora", 0)):
        events: list[Event] = []
        options = Options(overwrite=True)
        train(options, events, method=method, training={"max_steps": 1})
        texts = [event.text for event in events if isinstance(event, Warned)]
        assert sum("down_proj has 96 inputs" in text for text in texts) == told


def test_the_only_step_of_a_run_trains(train: Train) -> None:
    """A first step of warm-up has a learning rate of zero."""
    result = train(training={"max_steps": 1})
    update = load_file(result.result / "adapter_model.safetensors")
    assert any(value.any() for name, value in update.items() if "lora_B" in name)


def test_the_best_checkpoint_is_published_and_kept(train: Train) -> None:
    events: list[Event] = []
    result = train(
        events=events,
        # The first step's rate is zero; the next ones destroy the model.
        training={"max_steps": 6, "learning_rate": 10.0, "schedule": "constant_with_warmup"},
        evaluation={"steps": 1},
    )
    looks = [event for event in events if isinstance(event, Evaluated)]
    best = min(looks, key=lambda look: look.loss)
    assert result.best_step == best.step < 6
    kept = result.output / "checkpoints" / f"checkpoint-{best.step}"
    published = load_file(result.result / "adapter_model.safetensors")
    for name, tensor in load_file(kept / "adapter_model.safetensors").items():
        assert torch.equal(tensor, published[name])
    steps = sorted(path.name for path in (result.output / "checkpoints").iterdir())
    assert steps == sorted({f"checkpoint-{best.step}", "checkpoint-6"})


def test_early_stopping_threshold(train: Train) -> None:
    """An improvement below the threshold is none."""
    result = train(
        training={"max_steps": 30, "learning_rate": 1e-5},
        evaluation={"steps": 1, "early_stopping": 2, "early_stopping_threshold": 1.0},
    )
    assert result.steps == 3


def test_early_stopping(train: Train) -> None:
    result = train(
        training={"max_steps": 30, "learning_rate": 1.0, "schedule": "constant"},
        evaluation={"steps": 1, "early_stopping": 2},
    )
    assert result.steps < 30


def test_the_held_out_loss_does_not_depend_on_the_batch_size(train: Train) -> None:
    losses = []
    for size in (1, 3, 8):
        result = train(Options(overwrite=True), evaluation={"batch_size": size, "steps": 4})
        losses.append(result.best_eval_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_accumulation_does_not_change_the_result(train: Train) -> None:
    weights = []
    for micro in (8, 2):
        result = train(Options(overwrite=True), training={"micro_batch_size": micro})
        weights.append(load_file(result.result / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=2e-3, atol=2e-4)


def test_the_same_recipe_gives_the_same_bytes(train: Train) -> None:
    files = []
    for _ in range(2):
        result = train(Options(overwrite=True), method={"name": "lora", "dropout": 0.1})
        files.append((result.result / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_second_run_is_refused_with_the_ways_out(train: Train) -> None:
    train()
    with pytest.raises(UsageError, match="finished run") as caught:
        train()
    assert "--overwrite" in caught.value.hint
    with pytest.raises(UsageError, match="nothing to resume"):
        train(Options(resume=True))


def test_a_folder_of_somebody_else_is_never_touched(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        train(Options(overwrite=True))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "mine"


def test_a_gpu_recipe_without_a_gpu(train: Train) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ResourceError, match="PyTorch sees no GPU"):
        train(training={"device": "cuda"})


def test_numbers_that_blow_up_stop_the_run(train: Train, base_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base_model, broken)
    model = AutoModelForCausalLM.from_pretrained(base_model)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e30)
    model.lm_head.weight.data.mul_(1e20)
    model.save_pretrained(broken)
    with pytest.raises(NumericalError, match="not finite for 2 steps in a row"):
        train(
            model=str(broken),
            training={"max_steps": 40, "on_nonfinite": "skip", "max_nonfinite_steps": 2},
            evaluation={"steps": 40},
        )
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_tracker_that_is_not_installed_is_named(train: Train) -> None:
    if find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    with pytest.raises(UsageError, match="mlflow is not installed") as caught:
        train(training={"report_to": ["mlflow"]})
    assert "peftcli[mlflow]" in caught.value.hint


def test_an_unusual_learning_rate_is_told(train: Train) -> None:
    events: list[Event] = []
    train(events=events, training={"learning_rate": 5e-3})
    assert any("outside the usual" in e.text for e in events if isinstance(e, Warned))


def test_the_fingerprint_stops_an_adapter_on_another_base(
    train: Train, base_model: Path, tmp_path: Path
) -> None:
    result = train()
    assert read_fingerprint(result.result) == fingerprint(base_model)
    check_same_base(result.result, base_model)
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base_model)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.01)
    model.save_pretrained(other)
    with pytest.raises(ArtefactError, match="is not the base"):
        check_same_base(result.result, other)


def test_a_module_trained_whole_changes_and_is_saved(train: Train, base_model: Path) -> None:
    method = {"name": "lora", "rank": 4, "modules_to_save": ["lm_head"]}
    result = train(method=method, training={"max_steps": 2})
    saved = load_file(result.result / "adapter_model.safetensors")
    head = next(tensor for name, tensor in saved.items() if "lm_head" in name)
    before = load_file(base_model / "model.safetensors")["lm_head.weight"]
    assert head.shape == before.shape
    assert not torch.equal(head, before)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "lora", "rank": 4, "target_modules": ["lm_head"]}, "put `lm_head` in modules"),
        ({"name": "lora", "rank": 4, "target_modules": ["nope"]}, "matches nothing"),
        ({"name": "lora", "rank": 4, "layers": [7]}, "names layer 7"),
        ({"name": "lora", "rank": 4, "trainable_token_indices": [999]}, "has 288 tokens"),
        ({"name": "adapter", "trainable_token_indices": [999]}, "has 288 tokens"),
    ],
)
def test_what_the_model_cannot_take_is_refused(
    train: Train, method: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(method=method)
