"""Whole evaluations of a run that has learned its task, and of runs that are broken on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from colours import COLOURS, colour_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftcli.adapters import load_adapter
from peftcli.errors import ArtefactError, DataError, UsageError
from peftcli.evaluate.options import EvalOptions, Gates
from peftcli.evaluate.progress import Progressed
from peftcli.evaluate.result import Evaluation
from peftcli.evaluate.run import run
from peftcli.events import Note, Warned
from peftcli.models import Device, load_base
from peftcli.recipe.schema import Model

QUICK = EvalOptions(latency=False, resamples=400, retain=())
WRITTEN = EvalOptions(latency=False, resamples=400, retain=(), metrics=("exact_match",))


def evaluate(source: Path, options: EvalOptions = QUICK) -> Evaluation:
    return run(source, options, lambda event: None)


def value(evaluation: Evaluation, metric: str, arm: str) -> float:
    score = evaluation.score(metric, arm)
    assert score is not None
    return score.value


def copied(source: Path, target: Path, **data: object) -> Path:
    """The run with another data section in its recipe."""
    shutil.copytree(source, target)
    recipe = yaml.safe_load((target / "recipe.yaml").read_text())
    recipe["data"].update(data)
    (target / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return target


def merge(source: Path) -> None:
    recipe = yaml.safe_load((source / "recipe.yaml").read_text())
    base = load_base(Model(name=recipe["model"]["name"]), Device("cpu", "float32", "CPU", None))
    load_adapter(base, source / "adapter").merge_and_unload().save_pretrained(source / "merged")


def test_a_learned_task_is_seen_as_learned(colour_run: Path) -> None:
    found = evaluate(colour_run, EvalOptions(resamples=400))
    assert found.primary == "accuracy"
    assert value(found, "accuracy", "adapter") == value(found, "macro_f1", "adapter") == 1.0
    assert value(found, "accuracy", "base") < 0.6
    change = next(one for one in found.differences if one.metric == "accuracy")
    assert change.verdict == "better"
    assert found.rows.held_out == found.rows.answered == 40
    assert found.rows.leaked == 0
    assert [one.source for one in found.forgetting] == ["bundled:general"]
    assert {(one.arm, one.batch) for one in found.latency} == {
        ("base", 1), ("base", 8), ("adapter", 1), ("adapter", 8)
    }  # fmt: skip
    assert all(one.interleaved and one.tokens_per_second > 0 for one in found.latency)
    assert all(arm.weights_gib for arm in found.arms)
    written = json.loads((colour_run / "eval.json").read_text())
    assert written["scores"][0]["metric"] == "accuracy"
    assert "<html" in (colour_run / "report.html").read_text()


def test_the_loss_is_the_trainers(colour_run: Path) -> None:
    manifest = json.loads((colour_run / "run.json").read_text())
    found = evaluate(colour_run)
    assert value(found, "loss", "adapter") == pytest.approx(
        manifest["result"]["best_eval_loss"], abs=1e-6
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_the_loss_is_the_trainers_on_other_families(
    family: str,
    base_model: Path,
    train_colours: Callable[..., Path],
    tmp_path: Path,
    tiny_base: Callable[[str, Path], Path],
) -> None:
    base = tiny_base(family, tmp_path / family)
    folder = train_colours(
        model=str(base),
        method={"name": "lora", "rank": 4},
        training={"max_steps": 3, "micro_batch_size": 4},
        evaluation={"steps": 3, "batch_size": 7},
    )
    trained = json.loads((folder / "run.json").read_text())["result"]["best_eval_loss"]
    assert value(evaluate(folder), "loss", "adapter") == pytest.approx(trained, rel=1e-5)


def test_packed_plain_text_has_the_trainers_loss(
    train_colours: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"text": f"{i} apples are red and {i} stones are grey."} for i in range(40)]
    file = write_rows(tmp_path / "text.jsonl", rows)
    folder = train_colours(
        data={"train": str(file), "labels": None}, training={"max_steps": 3, "packing": True}
    )
    trained = json.loads((folder / "run.json").read_text())["result"]["best_eval_loss"]
    found = evaluate(folder)
    assert found.primary == "loss"
    assert value(found, "loss", "adapter") == pytest.approx(trained, rel=1e-5)
    assert found.examples == ()


def test_three_arms_and_a_merge_that_changed_nothing(colour_run: Path, tmp_path: Path) -> None:
    folder = copied(colour_run, tmp_path / "run")
    merge(folder)
    gates = Gates(max_merge_drift=0.01, min_gain=0, fail_under={"exact_match": 0.5})
    found = evaluate(folder, EvalOptions(latency=False, resamples=400, retain=(), gates=gates))
    assert [arm.name for arm in found.arms] == ["base", "adapter", "merged"]
    assert value(found, "loss", "merged") == pytest.approx(
        value(found, "loss", "adapter"), rel=1e-4
    )
    drift = [one for one in found.differences if one.second == "merged"]
    assert {one.verdict for one in drift if one.metric != "loss"} == {"no measurable difference"}
    assert [gate.outcome for gate in found.gates] == ["passed"] * 3
    assert set(found.examples[0].answers) == {"base", "adapter", "merged"}


def test_a_damaged_merge_is_a_regression(colour_run: Path, tmp_path: Path) -> None:
    folder = copied(colour_run, tmp_path / "run")
    merge(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)
    model.save_pretrained(folder / "merged")
    gates = Gates(max_merge_drift=0.01)
    found = evaluate(folder, EvalOptions(latency=False, resamples=400, retain=(), gates=gates))
    assert [gate.outcome for gate in found.gates] == ["regression"]


def test_another_template_than_in_training_costs_the_score(
    colour_run: Path, tmp_path: Path
) -> None:
    assert value(evaluate(colour_run, WRITTEN), "exact_match", "adapter") == 1.0
    broken = copied(colour_run, tmp_path / "run", chat_template="plain")
    assert value(evaluate(broken, WRITTEN), "exact_match", "adapter") < 0.7


def test_other_labels_than_in_training_cost_the_score(colour_run: Path, tmp_path: Path) -> None:
    broken = copied(colour_run, tmp_path / "run", labels=list(COLOURS[::-1]))
    assert value(evaluate(broken), "accuracy", "adapter") < 0.3


def test_other_stop_tokens_than_in_training_cost_the_score(
    colour_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftcli.evaluate import rows

    monkeypatch.setattr(rows, "generation_stops", lambda *_: (250,))
    found = evaluate(colour_run, WRITTEN)
    assert value(found, "exact_match", "adapter") < 0.3
    assert value(found, "ended", "adapter") < 0.3
    assert any("never learned the token that ends a turn" in note for note in found.notes)


def test_prompts_are_the_tokens_of_training_with_one_begin_token(
    colour_run: Path,
) -> None:
    found = evaluate(colour_run, WRITTEN)
    tokenizer = AutoTokenizer.from_pretrained(colour_run / "adapter")
    one = found.examples[0]
    asked = one.question.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    assert one.question == rendered


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    colour_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    options = EvalOptions(
        latency=False, resamples=400, retain=(), metrics=("exact_match",), batch_tokens=160
    )
    seen: list[Progressed] = []

    def stop_midway(event: Note | Warned | Progressed) -> None:
        if isinstance(event, Progressed):
            seen.append(event)
            if event.what == "adapter: loss" and event.done > 15:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(colour_run, options, stop_midway)
    assert seen[-1].done < seen[-1].total == 40
    again: list[Progressed] = []
    found = run(
        colour_run,
        options,
        lambda event: again.append(event) if isinstance(event, Progressed) else None,
    )
    totals = {event.what: event.total for event in again}
    assert totals == {"adapter: loss": 40 - seen[-1].done, "adapter: answers": 40}
    nothing: list[Progressed] = []
    same = run(
        colour_run,
        options,
        lambda event: nothing.append(event) if isinstance(event, Progressed) else None,
    )
    assert nothing == []
    assert same.scores == found.scores
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "another"))
    assert evaluate(colour_run, options).scores == found.scores


def test_rows_of_the_training_are_found_by_content_and_left_out(
    colour_run: Path, tmp_path: Path
) -> None:
    new, old = colour_rows(12, start=500), colour_rows(3)
    file = write_rows(tmp_path / "asked.jsonl", [*new, *old])
    found = evaluate(
        colour_run, EvalOptions(latency=False, resamples=400, retain=(), data=(str(file),))
    )
    held_out = 15 - 12 - (found.rows.leaked or 0)
    assert found.rows.leaked == 3 - held_out
    assert found.rows.held_out == 12 + held_out
    assert found.rows.source == str(file)


def test_training_rows_that_changed_make_held_out_rows_doubtful(
    train_colours: Callable[..., Path],
) -> None:
    folder = train_colours(training={"max_steps": 1})
    rows = folder.parent / "rows.jsonl"
    write_rows(rows, [*colour_rows(), *colour_rows(1, start=900)])
    with pytest.raises(DataError, match="changed since the run"):
        evaluate(folder)


def test_references_that_are_cut_are_counted_and_refused(colour_run: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{i} apple", "label": 0} for i in range(300, 319)]
    long = {"text": "9 stone " * 6, "label": 3}
    file = write_rows(tmp_path / "asked.jsonl", [*rows, long, {**long, "label": 1}])
    folder = copied(colour_run, tmp_path / "run", max_length=54)
    options = EvalOptions(latency=False, resamples=400, retain=(), data=(str(file),))
    with pytest.raises(DataError, match="2 of 21 references") as caught:
        evaluate(folder, options)
    assert "--max-cut 10%" in caught.value.hint
    allowed = EvalOptions(latency=False, resamples=400, retain=(), data=(str(file),), max_cut=0.1)
    found = evaluate(folder, allowed)
    assert (found.rows.cut, found.rows.answered) == (2, 19)
    assert "9 stone" in found.rows.cut_rows[0]


def test_against_an_earlier_report(
    colour_run: Path, train_colours: Callable[..., Path], tmp_path: Path
) -> None:
    good = evaluate(copied(colour_run, tmp_path / "good"))
    poor = copied(colour_run, tmp_path / "poor")
    weights = poor / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    options = EvalOptions(latency=False, resamples=400, retain=(), against=good.written[0])
    found = evaluate(poor, options)
    assert [gate.outcome for gate in found.gates] == ["regression"]
    assert next(one for one in found.differences if one.first == "earlier").verdict == "worse"
    same = evaluate(colour_run, options)
    assert [gate.outcome for gate in same.gates] == ["inconclusive"]


def test_an_adapter_of_somebody_else(colour_run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "theirs"
    shutil.copytree(colour_run / "adapter", adapter)
    (adapter / "base_fingerprint.json").unlink()
    rows = [
        {"prompt": f"{i} {thing}", "completion": colour}
        for i, thing, colour in (
            (801, "apple", "red"),
            (803, "sky", "blue"),
            (804, "grass", "green"),
        )
    ]
    file = write_rows(tmp_path / "asked.jsonl", rows)
    out = tmp_path / "report"
    found = evaluate(
        adapter,
        EvalOptions(latency=False, resamples=400, retain=(), data=(str(file),), output=out),
    )
    assert [arm.name for arm in found.arms] == ["base", "adapter"]
    assert value(found, "exact_match", "adapter") == 1.0
    assert found.rows.leaked is None
    assert (out / "eval.json").is_file()


def test_a_base_that_does_not_match_is_refused_before_it_loads(
    colour_run: Path, tmp_path: Path
) -> None:
    folder = copied(colour_run, tmp_path / "run")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    other = tmp_path / "other"
    shutil.copytree(recipe["model"]["name"], other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    model.save_pretrained(other)
    recipe["model"]["name"] = str(other)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ArtefactError, match="is not the base"):
        evaluate(folder)


def test_a_full_run_is_compared_with_its_base(train_colours: Callable[..., Path]) -> None:
    folder = train_colours(method="full", training={"max_steps": 20, "learning_rate": 3e-3})
    found = evaluate(folder)
    assert [arm.name for arm in found.arms] == ["base", "tuned"]
    assert value(found, "loss", "tuned") < value(found, "loss", "base")


def test_a_recipe_before_training_is_about_its_base(colour_run: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((colour_run / "recipe.yaml").read_text())
    recipe["output"] = str(tmp_path / "new")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    found = evaluate(file)
    assert [arm.name for arm in found.arms] == ["base"]
    assert found.differences == ()


def test_a_function_of_the_user(
    colour_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_scores.py").write_text(
        "def same_length(prediction, reference):\n    return len(prediction) == len(reference)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = EvalOptions(
        latency=False, resamples=400, retain=(), metric_function="own_scores:same_length"
    )
    found = evaluate(colour_run.absolute(), options)
    assert value(found, "same_length", "adapter") == 1.0


def test_train_on_all_still_asks_questions(train_colours: Callable[..., Path]) -> None:
    folder = train_colours(data={"train_on": "all"}, training={"max_steps": 2})
    found = evaluate(folder)
    assert found.rows.answered == 40
    assert found.rows.tokens > 40 * 10
    assert found.primary == "accuracy"


def test_metrics_that_cannot_be_are_refused(colour_run: Path) -> None:
    with pytest.raises(UsageError, match="did you mean exact_match"):
        evaluate(colour_run, EvalOptions(metrics=("exact_macth",)))


def test_gates_of_the_recipe_are_judged(train_colours: Callable[..., Path]) -> None:
    gates = {"fail_under": {"accuracy": "90%"}, "min_gain": 0}
    folder = train_colours(
        training={"max_steps": 1}, evaluation={"steps": 1, "gates": gates, "retain": []}
    )
    found = evaluate(folder, EvalOptions(latency=False, resamples=400))
    assert [gate.name for gate in found.gates] == ["fail_under accuracy", "min_gain"]
    assert found.gates[0].outcome == "regression"
    assert found.forgetting == ()
