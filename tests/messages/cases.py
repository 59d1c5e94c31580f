"""Bad inputs of every kind: what is put into an empty folder, and the command that meets it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Write = Callable[[Path], None]
GOOD = "model: bundled:tiny\nmethod: lora\ndata: {train: rows.jsonl, eval: 20%}\noutput: run\n"
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "bundled:tiny",
}
TRAIN = ("train", "r.yaml")
DRY = ("train", "r.yaml", "--dry-run")


@dataclass(frozen=True)
class Case:
    """Files by name, the arguments, and the exit code that they end in."""

    files: Mapping[str, str | bytes] = field(default_factory=dict)
    arguments: tuple[str, ...] = TRAIN
    code: int = 2


def recipe(text: str, *, code: int = 2, arguments: tuple[str, ...] = TRAIN) -> Case:
    """A recipe beside good rows."""
    return Case({"r.yaml": text, "rows.jsonl": CHAT * 20}, arguments, code)


def data(name: str, content: str | bytes, more: str = "", code: int = 2) -> Case:
    """A data file under a recipe that is good."""
    text = GOOD.replace("rows.jsonl", name) + more
    return Case({"r.yaml": text, name: content}, DRY, code)


def adapter(values: Mapping[str, object] | str, weights: bytes = b"", code: int = 4) -> Case:
    """An adapter folder that is merged."""
    text = values if isinstance(values, str) else json.dumps(ADAPTER | dict(values))
    files = {"adapter/adapter_config.json": text, "adapter/adapter_model.safetensors": weights}
    return Case(files, ("merge", "adapter"), code)


def model(files: Mapping[str, str | bytes], code: int = 4) -> Case:
    """A model folder that a good recipe names."""
    inside = {f"model/{name}": content for name, content in files.items()}
    text = GOOD.replace("bundled:tiny", "./model")
    return Case({"r.yaml": text, "rows.jsonl": CHAT * 20, **inside}, TRAIN, code)


LLAMA = '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, '
LLAMA += '"num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 288}'

CASES: dict[str, Case] = {
    # command lines
    "command-unknown": Case(arguments=("trian", "r.yaml")),
    "command-option-unknown": Case(arguments=("train", "r.yaml", "--resum")),
    "command-no-recipe": Case(arguments=("train",)),
    "command-recipe-absent": Case(),
    "command-recipe-folder": Case({"r.yaml/x": ""}),
    "command-set-not-a-pair": recipe(GOOD, arguments=(*TRAIN, "--set", "seed")),
    "command-set-below-a-value": recipe(GOOD, arguments=(*TRAIN, "--set", "seed.x=1")),
    "command-gallery-unknown": Case(arguments=("recipes", "show", "qwen3-8b/qlra")),
    "command-estimate-nothing": Case(arguments=("estimate",)),
    "command-merge-nothing": Case(arguments=("merge",)),
    "command-merge-absent": Case(arguments=("merge", "nowhere/at/all")),
    "command-eval-absent": Case(arguments=("eval", "nowhere/at/all")),
    "command-eval-limit": Case(arguments=("eval", "x", "--fail-under", "accuracy")),
    "command-resume-nothing": recipe(GOOD, arguments=(*TRAIN, "--resume")),
    # recipes
    "recipe-empty": recipe(""),
    "recipe-list": recipe("- model\n"),
    "recipe-two-documents": recipe("model: a\n---\nmodel: b\n"),
    "recipe-tab": recipe("model:\n\tname: a\n"),
    "recipe-tag": recipe("model: !!python/object/apply:os.system ['x']\n"),
    "recipe-unclosed": recipe("model: {name: a\n"),
    "recipe-key-twice": recipe(GOOD + "seed: 1\nseed: 2\n"),
    "recipe-unknown-key": recipe(GOOD + "training: {lrr: 1}\n"),
    "recipe-foreign-key": recipe(GOOD + "lora_alpha: 16\n"),
    "recipe-wrong-types": recipe(
        GOOD + "training: {learning_rate: .nan, max_steps: true, packing: 'yes', epochs: -1}\n"
    ),
    "recipe-nothing-required": recipe("seed: 1\n"),
    "recipe-method": recipe(GOOD.replace("lora", "lorra")),
    "recipe-token": recipe(GOOD + "hub_token: hf_" + "a" * 30 + "\n"),
    "recipe-model-absent": recipe(GOOD.replace("bundled:tiny", "./no-such-model")),
    "recipe-bundled-absent": recipe(GOOD.replace("bundled:tiny", "bundled:tin")),
    "recipe-template-absent": recipe(GOOD.replace("eval:", "chat_template: x.jinja, eval:")),
    "recipe-rank": recipe(GOOD.replace("method: lora", "method: {name: lora, rank: 4000}")),
    "recipe-output-file": recipe(GOOD.replace("output: run", "output: r.yaml")),
    "recipe-output-foreign": Case({"r.yaml": GOOD, "rows.jsonl": CHAT * 20, "run/thesis.txt": "x"}),
    # data
    "data-absent": recipe(GOOD.replace("rows.jsonl", "rowz.jsonl")),
    "data-empty": data("d.jsonl", ""),
    "data-blank": data("d.jsonl", "\n\n\n"),
    "data-latin1": data("d.jsonl", '{"prompt": "é", "completion": "b"}\n'.encode("latin-1")),
    "data-utf16": data("d.jsonl", CHAT.encode("utf-16")),
    "data-broken-line": data("d.jsonl", CHAT * 3 + '{"messages": [}\n' + CHAT),
    "data-cut": data("d.jsonl", CHAT * 3 + CHAT[:40]),
    "data-lfs-pointer": data("d.jsonl", "version https://git-lfs.github.com/spec/v1\noid x\n"),
    "data-csv-renamed": data("d.jsonl", "prompt,completion\na,b\n"),
    "data-unknown-columns": data("d.jsonl", '{"foo": "a", "bar": "b"}\n' * 9),
    "data-null-completion": data("d.jsonl", '{"prompt": "a", "completion": null}\n' * 9),
    "data-number-completion": data("d.jsonl", '{"prompt": "a", "completion": 7}\n' * 9),
    "data-empty-messages": data("d.jsonl", CHAT * 9 + '{"messages": []}\n'),
    "data-no-answer": data("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n' * 9),
    "data-unknown-role": data("d.jsonl", CHAT.replace('"user"', '"robot"') * 9),
    "data-deep": data("d.jsonl", CHAT * 9 + '{"a": ' + "[" * 3000 + "\n"),
    "data-surrogate": data("d.jsonl", CHAT * 9 + CHAT.replace('"a"', '"\\ud800"')),
    "data-nul": data("d.jsonl", CHAT * 9 + CHAT.replace('"a"', '"\\u0000"')),
    "data-duplicate-key": data("d.jsonl", CHAT * 9 + '{"prompt": "a", "prompt": "b"}\n'),
    "data-broken-gzip": data("d.jsonl.gz", b"\x1f\x8b" + b"x" * 40),
    "data-csv-header": data("d.csv", "prompt,prompt\na,b\n"),
    "data-parquet": data("d.parquet", b"PAR1 no PAR1"),
    "data-suffix": data("d.xml", "<a/>"),
    "data-numeric-labels": data("d.jsonl", '{"text": "a", "label": 1}\n' * 9),
    "data-preferences": data("d.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9),
    # adapters
    "adapter-not-json": adapter("{"),
    "adapter-deep": adapter("[" * 100_000),
    "adapter-kind": adapter({"peft_type": "PROMPT_TUNING"}, code=2),
    "adapter-kind-unknown": adapter({"peft_type": "MAGIC"}, code=2),
    "adapter-alpha": adapter({"lora_alpha": float("nan")}),
    "adapter-rank": adapter({"r": 10**9}),
    "adapter-code": adapter({"megatron_core": "os"}),
    "adapter-pattern": adapter({"target_modules": "("}, b"\2\0\0\0\0\0\0\0{}"),
    "adapter-weights-empty": adapter({}),
    "adapter-weights-missing-tensors": adapter({}, b"\2\0\0\0\0\0\0\0{}"),
    "adapter-no-base": adapter({"base_model_name_or_path": None}, code=2),
    "adapter-weights-pickle": Case(
        {"adapter/adapter_config.json": json.dumps(ADAPTER), "adapter/adapter_model.bin": b"x"},
        ("merge", "adapter"),
        4,
    ),
    # models
    "model-empty-folder": model({"x": ""}),
    "model-not-json": model({"config.json": "{"}),
    "model-unknown-type": model({"config.json": '{"model_type": "nonsense"}'}),
    "model-no-tokenizer": model({"config.json": LLAMA}),
    "model-code": model(
        {"config.json": '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}'}
    ),
}
