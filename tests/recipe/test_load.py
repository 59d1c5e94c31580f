"""From a YAML file to a Recipe: all problems at once, each with its place and its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from peftcli.errors import RecipeError
from peftcli.recipe.load import leaves, load_recipe, recipe_text, resolved

GOOD = """\
model: bundled:tiny
method: lora
data:
  train: rows.jsonl
output: runs/x
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return caught.value.message.replace(str(folder) + "/", "").splitlines()


def test_a_short_recipe_gets_the_defaults_of_an_expert(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD)).recipe
    assert recipe.model.name == "bundled:tiny"
    assert recipe.method.rank == 16
    assert recipe.method.alpha == 32
    assert recipe.method.target_modules == "all-linear"
    assert recipe.learning_rate == 2e-4
    assert recipe.optimizer == "adamw_torch_fused"
    assert recipe.data.eval == 0.05
    assert recipe.data.train_on == "answers"
    assert recipe.training.schedule == "cosine"
    assert recipe.training.warmup == 0.03
    assert recipe.training.batch_size == 16


@pytest.mark.parametrize(
    ("method", "rate", "optimizer"),
    [
        ("lora", 2e-4, "adamw_torch_fused"),
        ("qlora", 2e-4, "paged_adamw_32bit"),
        ("adapter", 1e-4, "adamw_torch_fused"),
        ("{name: adapter, quantization: nf4}", 1e-4, "paged_adamw_32bit"),
        ("full", 1e-5, "adamw_torch_fused"),
    ],
)
def test_defaults_of_each_method(tmp_path: Path, method: str, rate: float, optimizer: str) -> None:
    recipe = load_recipe(write(tmp_path, GOOD.replace("method: lora", f"method: {method}"))).recipe
    assert (recipe.learning_rate, recipe.optimizer) == (rate, optimizer)


BAD = """\
model: bundled:tiny
method:
  name: lora
  rnak: 3
  rank: x
  bottleneck_size: 4
data:
  train:
    - a.jsonl
    - path: x
      limi: 3
output: runs/x
output: runs/y
training:
  micro_batch_size: 0
  packing: 'yes'
  learning_rate: true
  epochs: "3"
  schedule: cosin
  lr: 3
  weight_decay: .nan
  warmup: -1
  max_steps: 1.5
bogus: 1
max_length: 3
"""
BAD_LINES = """\
r.yaml:13:1: output: written twice in the same section; the first is at r.yaml:12:1; keep one
r.yaml:4:3: method.rnak: unknown key; did you mean `rank`?
r.yaml:5:3: method.rank: expected a whole number, found text `x`
r.yaml:6:3: method.bottleneck_size: `lora` has no such key; it belongs to adapter
r.yaml:11:7: data.train.1.limi: unknown key; did you mean `limit`?
r.yaml:15:3: training.micro_batch_size: at least 1, found 0; or write `auto`
r.yaml:16:3: training.packing: `yes` is none of auto, true or false
r.yaml:17:3: training.learning_rate: expected a number, found true or false `true`
r.yaml:18:3: training.epochs: expected a number, found text `3`
r.yaml:19:3: training.schedule: `cosin` is none of cosine, linear, constant, constant_with_warmup, \
polynomial, inverse_sqrt; did you mean `cosine`?
r.yaml:20:3: training.lr: unknown key; here it is `training.learning_rate`
r.yaml:21:3: training.weight_decay: must be a finite number, found `nan`
r.yaml:22:3: training.warmup: must be at least 0, found `-1`
r.yaml:23:3: training.max_steps: expected a whole number, found a number `1.5`
r.yaml:24:1: bogus: unknown key; the keys here are model, method, data, training, evaluation, \
output, seed
r.yaml:25:1: max_length: unknown key here; it belongs at `data.max_length`
"""


def test_every_problem_at_once_with_place_and_remedy(tmp_path: Path) -> None:
    assert refusal(tmp_path, BAD) == BAD_LINES.splitlines()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("method: lorra", "r.yaml:2:1: method: no method is called `lorra`; did you mean `lora`?"),
        ("method: {rank: 4}", "r.yaml:2:1: method: missing; write `name:` and one of lora, qlora"),
        ("method: {name: lora, quantization: nf4}", "nf4 belongs to `name: qlora`; lora takes"),
        ("method: {name: full, rank: 4}", "`full` has no such key; it belongs to lora and qlora"),
        ("method: {name: adapter, bottleneck_size: 8, reduction_factor: 2}", "exclude each other"),
        ("method: {name: lora, use_dora: true, init: eva}", "does not work with `use_dora: true`"),
        (
            "method: {name: adapter, compute_dtype: float32}",
            "r.yaml:2:25: method.compute_dtype: be",
        ),
        ("method: {name: adapter, double_quantization: false}", "write `quantization: nf4` too"),
        ("method: {name: lora, target_modules: 3}", "expected text or a list or `all-linear`"),
    ],
)
def test_method_problems(tmp_path: Path, line: str, message: str) -> None:
    assert message in refusal(tmp_path, GOOD.replace("method: lora", line))[0]


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("training: {batch_size: 16, micro_batch_size: 3}", "3 does not divide `batch_size` 16"),
        (
            "training: {save_steps: 15}\nevaluation: {steps: 10}",
            "r.yaml:6:12: training.save_steps: 15 is no multiple of `evaluation.steps` 10",
        ),
        (
            "evaluation: {gates: {max_merge_drift: 1%}}",
            "r.yaml:6:22: evaluation.gates.max_merge_drift: nothing is merged after `adapter`",
        ),
        ("training: {warmup: 1.5}", "a share below 1 or a whole number of steps, found 1.5"),
        ("training: {learning_rate: .inf}", "must be a finite number, found `inf`"),
        ("training: {learning_rate: -1}", "must be above 0"),
        ("training: {report_to: wandb}", "expected a list, found text `wandb`"),
        ("training: {report_to: [wand]}", "did you mean `wandb`?"),
        ("seed: -1", "r.yaml:6:1: seed: must be at least 0, found `-1`"),
        # None of these may reach an estimate: it would count for hours, or tell the time of it.
        (
            "training: {batch_size: 1000000000000}",
            "r.yaml:6:12: training.batch_size: must be at most 100000, found `1000000000000`",
        ),
        (
            "training: {max_steps: 1000000000000}",
            "r.yaml:6:12: training.max_steps: must be at most 1000000000, found `1000000000000`",
        ),
        (
            "training: {epochs: 1.0e+30}",
            "r.yaml:6:12: training.epochs: must be at most 1000000.0, found `1e+30`",
        ),
    ],
)
def test_rules_between_keys(tmp_path: Path, addition: str, message: str) -> None:
    text = GOOD.replace("lora", "adapter") if "adapter" in message else GOOD
    assert message in refusal(tmp_path, text + addition + "\n")[0]


def test_rules_between_keys_are_told_beside_wrong_keys(tmp_path: Path) -> None:
    text = GOOD.replace("lora", "adapter").replace("rows.jsonl", "rows.jsonl\n  eval: nul")
    text += (
        "bogus: 1\ntraining: {micro_batch_size: 3, epochs: many, save_steps: 15}\n"
        "evaluation: {steps: 10, gates: {max_merge_drift: 1%, min_gain: much}}\n"
    )
    lines = refusal(tmp_path, text)
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        "bogus",
        "training.micro_batch_size",
        "training.epochs",
        "training.save_steps",
        "evaluation.gates.max_merge_drift",
        "evaluation.gates.min_gain",
    ]


def test_a_rule_is_not_judged_by_the_default_of_a_wrong_key(tmp_path: Path) -> None:
    text = GOOD + "training: {batch_size: twelve, micro_batch_size: 3}\n"
    assert [line.split(": ")[1] for line in refusal(tmp_path, text)] == ["training.batch_size"]


def test_a_wrong_key_in_a_required_place_hides_nothing(tmp_path: Path) -> None:
    text = "model: 3\nmethod: {name: loraa}\ndata: {train: 4, max_length: 1}\noutput: ''\n"
    assert [line.split(": ")[1] for line in refusal(tmp_path, text)] == [
        "model",
        "method",
        "data.train",
        "data.max_length",
        "output",
    ]


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (
            "rows.jsonl",
            "[null]",
            ["r.yaml:4:11: data.train.0: expected a section of keys, found no"],
        ),
        (
            "rows.jsonl",
            "[{path: a, weight: 0}]",
            ["r.yaml:4:21: data.train.0.weight: must be above"],
        ),
        (
            "rows.jsonl",
            "a\n  eval: []",
            ["r.yaml:5:3: data.eval: expected a share such as `5%`, a "],
        ),
        (
            "rows.jsonl",
            "a\n  eval: true",
            ["r.yaml:5:3: data.eval: expected a share such as `5%`, a "],
        ),
        ("bundled:tiny", "{name: a, revision: 3}", ["found a whole number `3`; put it in quotes"]),
        ("bundled:tiny", "{name: a, dtype: fp16}", ["did you mean `float16`?"]),
        ("method: lora", "method: LoRA", ["did you mean `lora`? The methods are"]),
        ("method: lora", "method: {name: lora, layers: []}", ["must not be empty, found `[]`"]),
        ("method: lora", "method: {name: lora, target_modules: []}", ["must not be empty"]),
        ("method: lora", "method: {name: lora, alpha_pattern: {q: 0}}", ["must be above 0"]),
        ("output: runs/x", "output: x\ntraining:", ["found nothing; write a value, or remove"]),
        (
            "output: runs/x",
            "output: x\ntraining.epochs: 3",
            ["write `epochs` on a line of its own"],
        ),
    ],
)
def test_one_line_says_what_to_write(tmp_path: Path, old: str, new: str, lines: list[str]) -> None:
    found = refusal(tmp_path, GOOD.replace(old, new))
    assert len(found) == len(lines)
    for line, part in zip(found, lines, strict=True):
        assert part in line


@pytest.mark.parametrize("share", ["0%", "100%", "1.5", "0"])
def test_an_eval_share_lies_inside(tmp_path: Path, share: str) -> None:
    text = GOOD.replace("rows.jsonl", f"rows.jsonl\n  eval: {share}")
    assert "a share lies between 0 % and 100 %" in refusal(tmp_path, text)[0]


def test_early_stopping_needs_held_out_rows(tmp_path: Path) -> None:
    text = GOOD.replace("rows.jsonl", "rows.jsonl\n  eval: null")
    text += "evaluation: {early_stopping: 2, steps: 5, gates: {min_gain: 0}}\n"
    lines = refusal(tmp_path, text)
    assert [line.split(": ")[1].partition(".")[2] for line in lines] == [
        "early_stopping",
        "steps",
        "gates",
    ]
    assert all("needs held-out rows" in line for line in lines)


def test_missing_sections_are_named(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "seed: 1\n")
    assert [line.split(": ")[1] for line in lines] == ["model", "method", "data", "output"]
    assert lines[0] == "r.yaml:1:1: model: missing; write `model: Qwen/Qwen3-8B`"


def test_overrides_are_validated_and_their_origin_is_known(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    loaded = load_recipe(file, ["training.learning_rate=1e-4", "method.rank=4", "data.eval=10%"])
    assert loaded.recipe.learning_rate == 1e-4
    assert loaded.recipe.method.rank == 4
    assert loaded.recipe.data.eval == pytest.approx(0.1)
    assert loaded.origin(("method", "rank")) == "--set method.rank=4"
    assert loaded.origin(("output",)) == f"{file}:5:1"
    assert loaded.origin(("training", "epochs")) == "default"
    assert loaded.origin(("model", "name")) == f"{file}:1:1"
    assert loaded.origin(("model", "dtype")) == "default"
    assert loaded.origin(("data", "max_length")) == "default"


def test_a_bad_override_names_itself(tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD, "training.epocs=2")[0] == (
        "--set training.epocs=2: training.epocs: unknown key; did you mean `epochs`?"
    )
    assert "not KEY=VALUE" in refusal(tmp_path, GOOD, "training.epochs")[0]
    assert "`seed` is not a section" in refusal(tmp_path, GOOD, "seed=1", "seed.x=1")[0]


def test_an_override_that_is_no_yaml_is_named_among_several(tmp_path: Path) -> None:
    broken = refusal(tmp_path, GOOD, "seed=3", "method.target_modules=[q_proj", "output=x")[0]
    assert broken.startswith("--set method.target_modules=[q_proj: not YAML: expected ',' or ']'")
    twice = refusal(tmp_path, GOOD, "seed=3", "training={epochs: 2, epochs: 3}")[0]
    assert twice == "--set training={epochs: 2, epochs: 3}: a key is written twice"


def test_overrides_go_into_sections_that_a_text_stands_for(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    loaded = load_recipe(file, ["data.train.limit=5", "method.rank=4", "model.dtype=float32"])
    source = loaded.recipe.data.train[0]
    assert (source.path, source.limit) == ("rows.jsonl", 5)
    wrong = refusal(tmp_path, GOOD, "output.x=1")
    assert wrong == ["--set output.x=1: `output` is not a section"]


def test_a_line_of_the_file_that_an_override_made_wrong_names_it(tmp_path: Path) -> None:
    section = GOOD.replace("method: lora", "method:\n  name: lora\n  rank: 8")
    assert section != GOOD
    assert refusal(tmp_path, section, "method.name=ia3", "seed=3")[0].startswith(
        "--set method.name=ia3: method: no method is called `ia3`"
    )
    wrong = refusal(tmp_path, section, "method.name=full", "seed=3")[0]
    assert wrong.startswith("r.yaml:4:3: method.rank: `full` has no such key")
    assert wrong.endswith("(because of --set method.name=full)")
    both = refusal(tmp_path, section, "training.save_steps=5", "evaluation.steps=3", "data.eval=5%")
    assert both[0].startswith("--set training.save_steps=5: training.save_steps: 5 is no multiple")
    assert "because of" not in both[0]
    plain = GOOD + "training:\n  kernels: plain\n"
    assert refusal(tmp_path, plain, "training.checkpointing=7")[0].endswith(
        "needs `auto` (because of --set training.checkpointing=7)"
    )
    own = refusal(tmp_path, plain + "  epocs: 3\n", "seed=3")[0]
    assert own.endswith("did you mean `epochs`?")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    for path, message in [(tmp_path / "no.yaml", "no such recipe"), (tmp_path, "a folder")]:
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model: caf\xe9\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8 at byte 10"):
        load_recipe(latin)


def test_an_unusual_learning_rate_is_a_warning_with_the_usual_range(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ["training.learning_rate=0.1"]).recipe
    assert "outside the usual 1e-05 to 0.002 for lora" in recipe.warnings()[0]
    assert load_recipe(write(tmp_path, GOOD)).recipe.warnings() == []


def test_the_resolved_recipe_reads_back_as_the_same_run(tmp_path: Path) -> None:
    first = load_recipe(write(tmp_path, GOOD)).recipe
    again = load_recipe(write(tmp_path, recipe_text(first))).recipe
    assert resolved(again) == resolved(first)
    assert yaml.safe_load(recipe_text(first))["training"]["learning_rate"] == 2e-4


def test_leaves_are_every_value_in_order() -> None:
    assert leaves({"a": {"b": 1, "c": []}, "d": 2}) == [
        (("a", "b"), 1),
        (("a", "c"), []),
        (("d",), 2),
    ]
