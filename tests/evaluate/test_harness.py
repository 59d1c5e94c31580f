"""lm-evaluation-harness on our loaded models, and our scores beside the harness's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from colours import THINGS
from transformers import AutoTokenizer

from peftcli.adapters import load_adapter
from peftcli.errors import UsageError
from peftcli.evaluate.arms import groups_of, load, switched
from peftcli.evaluate.generate import Answer, Decoding, write_answers
from peftcli.evaluate.options import EvalOptions
from peftcli.evaluate.run import run
from peftcli.evaluate.score import choice_log_likelihoods
from peftcli.evaluate.target import find_target
from peftcli.metrics import METRICS
from peftcli.models import Device, load_base
from peftcli.recipe.schema import Model

pytest.importorskip("lm_eval")
CPU = Device("cpu", "float32", "CPU", None)


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[str, str]:
    """A multiple choice task and a generation task as local YAML files on local rows."""
    docs = [
        {"q": f"{i} {THINGS[i % 4]}", "choices": ["red", "green", "blue", "grey"], "gold": i % 4}
        for i in range(600, 630)
    ]
    rows = tmp_path / "docs.jsonl"
    rows.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "<|user|>{{q}}<|end|><|assistant|>",
    }
    choice = {
        **{"task": "colour_choice", "output_type": "multiple_choice", "target_delimiter": ""},
        **{"doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    written = {
        **{"task": "colour_write", "output_type": "generate_until"},
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["<|end|>"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {
                "name": "word",
                "filter": [
                    {"function": "regex", "regex_pattern": "(red|green|blue|grey)"},
                    {"function": "take_first"},
                ],
            }
        ],
    }
    files = []
    for task in (choice, written):
        file = tmp_path / f"{task['task']}.yaml"
        file.write_text(yaml.safe_dump({**shared, **task}))
        files.append(str(file))
    return files[0], files[1]


def test_tasks_land_in_the_same_report(colour_run: Path, tasks: tuple[str, str]) -> None:
    options = EvalOptions(tasks=tasks, latency=False, resamples=300, retain=())
    found = run(colour_run, options, lambda event: None)
    for name in ("colour_choice acc", "colour_choice acc_norm", "colour_write exact_match (word)"):
        tuned, base = found.score(name, "adapter"), found.score(name, "base")
        assert tuned is not None
        assert base is not None
        assert tuned.value == 1.0
        assert tuned.rows == 30
        assert base.value < 0.6
        change = next(one for one in found.differences if one.metric == name)
        assert change.verdict == "better"


def test_the_harness_alone_gives_the_same_numbers(
    colour_run: Path, tasks: tuple[str, str], tmp_path: Path
) -> None:
    """On the merged model, because the harness would cut the padded vocabulary of a PEFT base."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    recipe = yaml.safe_load((colour_run / "recipe.yaml").read_text())
    base = load_base(Model(name=recipe["model"]["name"]), CPU)
    assert base.config.vocab_size > len(AutoTokenizer.from_pretrained(colour_run / "adapter"))
    tuned = load_adapter(base, colour_run / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    alone = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(tmp_path / "merged"),
            "tokenizer": recipe["model"]["name"],
            "dtype": "float32",
        },
        tasks=["colour_choice", "colour_write"],
        task_manager=TaskManager(include_path=str(Path(tasks[0]).parent)),
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    options = EvalOptions(tasks=tasks, latency=False, resamples=300, retain=())
    found = run(colour_run, options, lambda event: None)
    for task, metric in (
        *(("colour_choice", "acc"), ("colour_choice", "acc_norm")),
        ("colour_write", "exact_match"),
    ):
        kind = "word" if task == "colour_write" else "none"
        shown = f"{task} {metric}" + (" (word)" if kind == "word" else "")
        score = found.score(shown, "adapter")
        assert score is not None
        assert score.value == alone[task][f"{metric},{kind}"]


def test_an_unknown_task_and_a_missing_file(colour_run: Path) -> None:
    options = EvalOptions(tasks=("gsm8k_no_such",), latency=False, retain=())
    with pytest.raises(UsageError, match="no task gsm8k_no_such") as caught:
        run(colour_run, options, lambda event: None)
    assert "gsm8k" in caught.value.hint
    options = EvalOptions(tasks=("nowhere.yaml",), latency=False, retain=())
    with pytest.raises(UsageError, match="no such file"):
        run(colour_run, options, lambda event: None)


@pytest.mark.parametrize("arm", ["base", "adapter"])
def test_log_likelihoods_and_answers_item_by_item(colour_run: Path, arm: str) -> None:
    """The same model, prompts and candidates through both, in float32."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    (group,) = groups_of(find_target(colour_run), CPU)
    loaded = load(group, CPU)
    tokenizer = AutoTokenizer.from_pretrained(colour_run / "adapter")
    texts = [f"<|user|>{i} {THINGS[i % 4]}<|end|><|assistant|>" for i in range(600, 616)]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    labels = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("red", "green")]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    loaded.model.generation_config.eos_token_id = [end, int(tokenizer.eos_token_id)]
    with switched(loaded.model, arm) as model:
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4)
        requests = [(("", ""), prompt, label) for prompt in prompts for label in labels]
        expected = [value for value, _ in theirs._loglikelihood_tokens(requests, disable_tqdm=True)]
        ours: dict[int, list[float]] = {}
        choice_log_likelihoods(
            model,
            prompts,
            [labels] * len(prompts),
            tokens=256,
            done=lambda rows, values: ours.update(zip(rows, values, strict=True)),
        )
        flat = [value for row in range(len(prompts)) for value in ours[row]]
        assert flat == pytest.approx(expected, abs=1e-4)
        settings = {"until": ["<|end|>"], "max_gen_toks": 12, "do_sample": False}
        instances = [
            Instance("generate_until", {}, (text, dict(settings)), i)
            for i, text in enumerate(texts)
        ]
        written = theirs.generate_until(instances, disable_tqdm=True)
        answers: dict[int, Answer] = {}
        write_answers(
            model,
            prompts,
            Decoding(12, (end, int(tokenizer.eos_token_id)), 0, 256),
            CPU,
            lambda rows, values: answers.update(zip(rows, values, strict=True)),
        )
    said = [tokenizer.decode(answers[i].ids, skip_special_tokens=True) for i in range(len(texts))]
    assert said == written
    references = [("red", "green", "blue", "grey")[i % 4] for i in range(600, 616)]
    scores = [
        METRICS["exact_match"].measure(a, r)[0] for a, r in zip(said, references, strict=True)
    ]
    assert (sum(scores) / len(scores) == 1.0) == (arm == "adapter")
    assert torch.is_inference_mode_enabled() is False
