"""Metrics against the reference implementations on the same outputs, and on odd answers."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from peftcli.errors import ResourceError, UsageError
from peftcli.metrics import METRICS, Metric, find_metric, function_metric, last_number, macro_f1

SENTENCE = "The cat isn't on a mat, near Café 9 ; price: £30.50 . family-friendly THE 20,000"
WORDS = SENTENCE.split()


def score(metric: Metric, predictions: Sequence[str], references: Sequence[str]) -> float:
    rows = [metric.measure(p, r) for p, r in zip(predictions, references, strict=True)]
    return float(metric.total(np.array(rows).sum(0)))


def outputs(seed: int, rows: int = 60) -> tuple[list[str], list[str]]:
    """Random sentences; some predictions are empty, and some are right."""
    draw = random.Random(seed)
    references = [" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in range(rows)]
    predictions = [" ".join(draw.choices(WORDS, k=draw.randint(0, 14))) for _ in range(rows)]
    for index in range(0, rows, 5):
        predictions[index] = references[index]
    return predictions, references


@pytest.mark.parametrize("seed", range(5))
def test_bleu_and_chrf_are_sacrebleus(seed: int) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = outputs(seed)
    for rows in (1, 3, 60):
        answers, truths = predictions[-rows:], references[-rows:]
        expected = sacrebleu.corpus_bleu(answers, [truths]).score
        assert score(METRICS["bleu"], answers, truths) == pytest.approx(expected, abs=1e-9)
        expected = sacrebleu.corpus_chrf(answers, [truths]).score
        assert score(METRICS["chrf"], answers, truths) == pytest.approx(expected, abs=1e-9)


def test_rouge_l_is_the_mean_of_rouge_scores() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    predictions, references = outputs(7)
    expected = np.mean(
        [
            scorer.score(r, p)["rougeL"].fmeasure
            for p, r in zip(predictions, references, strict=True)
        ]
    )
    assert score(METRICS["rouge_l"], predictions, references) == pytest.approx(expected, abs=1e-12)


def test_exact_matches_are_those_of_lm_eval() -> None:
    harness = pytest.importorskip("lm_eval.api.metrics")
    predictions, references = outputs(8)
    plain = harness.exact_match_hf_evaluate(predictions, references)["exact_match"]
    assert score(METRICS["exact_match"], predictions, references) == plain
    predictions = [text.lower().replace(" ;", "").replace(" .", "") for text in predictions]
    references = [text.replace(" ;", ",").replace(" .", "!") for text in references]
    loose = harness.exact_match_hf_evaluate(
        predictions, references, ignore_case=True, ignore_punctuation=True
    )["exact_match"]
    assert score(METRICS["exact_match_loose"], predictions, references) == loose > 0.1


def test_numbers_are_those_of_lm_eval_on_gsm8k(shared: Path) -> None:
    harness = pytest.importorskip("lm_eval.api.metrics")
    regex = pytest.importorskip("lm_eval.filters.extraction").RegexFilter(
        "(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1
    )
    draw = random.Random(0)
    lines = (shared / "data/gsm8k/train.jsonl").read_text("utf-8").splitlines()[:300]
    truths = [json.loads(line)["answer"] for line in lines]
    answers = []
    for truth in truths:
        number = truth.rpartition("#### ")[2]
        wrong = str(draw.randint(1, 99))
        said = number if draw.random() < 0.6 else wrong
        answers.append(draw.choice([f"So it is ${said}", f"7 + 5 = {said}", f"#### {said}", said]))
    extracted = [found[0] for found in regex.apply([[a] for a in answers], [{}] * len(answers))]
    ignored = [",", r"\$", "(?s).*#### ", r"\.$"]
    expected = [
        harness.exact_match_hf_evaluate([a], [t], regexes_to_ignore=ignored, ignore_case=True)
        for a, t in zip(extracted, truths, strict=True)
    ]
    own = [METRICS["number_match"].measure(a, t)[0] for a, t in zip(answers, truths, strict=True)]
    assert own == [float(found["exact_match"]) for found in expected]
    assert 0.5 < sum(own) / len(own) < 0.8


def test_macro_f1_is_scikit_learns() -> None:
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    draw = random.Random(1)
    labels = ["a", "b", "c", "never", "rare"]
    truths = [*draw.choices(labels[:3], k=80), "rare"]
    chosen = [t if draw.random() < 0.6 else draw.choice("abc") for t in truths]
    expected = f1_score(truths, chosen, average="macro", zero_division=0)
    assert score(macro_f1(labels), chosen, truths) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,200.50 dollars", "1200.5"),
        ("#### 1,200", "1200"),
        ("#### -3\n", "-3"),
        ("#### 7 because 7 > 5", "7"),
        ("costs $18.", "18"),
        ("from 3 to .5", "0.5"),
        ("16-4=12", "12"),
        ("#### \nno number after it, 4 before", "4"),
        ("1,2,3", "3"),
    ],
)
def test_the_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


def test_no_number() -> None:
    assert last_number("none") is None
    assert METRICS["number_match"].measure("none", "none") == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "value"),
    [
        ("exact_match", " a  b\n", "a b", 1),
        ("exact_match", "A b", "a b", 0),
        ("exact_match", "Cafe\u0301", "Café", 1),
        ("exact_match_loose", "Yes, it is!", "yes it is", 1),
        ("json_valid", '```json\n{"a": 1}\n```', "", 1),
        ("json_valid", '{"a": 1} and more', "", 0),
        ("json_valid", "17", "", 0),
        ("json_match", '{"b":[1,2],"a":1}', '{"a": 1, "b": [1, 2]}', 1),
        ("json_match", "nonsense", "nonsense", 0),
        ("json_fields", '{"a": 1, "b": {"c": 3}}', '{"a": 1, "b": {"c": 2, "d": []}}', 1 / 3),
        ("json_fields", "nonsense", '{"a": 1}', 0),
        ("json_fields", "{}", "{}", 1),
        (r"regex:answer is (\w+)", "the answer is B, no, answer is C.", "answer is C", 1),
        (r"regex:answer is (\w+)", "the answer is B", "C", 0),
        (r"regex:\d+", "no digits", "7", 0),
    ],
)
def test_one_answer(name: str, prediction: str, reference: str, value: float) -> None:
    assert score(find_metric(name), [prediction], [reference]) == pytest.approx(value)


def test_an_unknown_metric_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean rouge_l") as caught:
        find_metric("rougeL")
    assert "json_fields" in caught.value.hint
    with pytest.raises(UsageError, match="regex:"):
        find_metric("regex:(")


def test_a_missing_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcli import overlap

    for name, module in (("bleu", "sacrebleu.metrics.bleu"), ("rouge_l", "rouge_score")):
        overlap._sacrebleu_bleu.cache_clear()
        overlap._rouge.cache_clear()
        for loaded in [key for key in sys.modules if key.startswith(module)]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ResourceError, match="needs the") as caught:
            METRICS[name].measure("a", "a")
        assert "peftcli[metrics]" in caught.value.hint


def test_a_function_of_the_user() -> None:
    metric = function_metric("own", lambda prediction, reference: len(prediction) > 2)
    assert score(metric, ["abc", "a"], ["", ""]) == 0.5
    with pytest.raises(UsageError, match="returned 'good'"):
        function_metric("own", lambda prediction, reference: "good").measure("a", "b")
