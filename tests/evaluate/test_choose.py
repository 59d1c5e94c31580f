"""The score follows from the rows."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from peftcli.evaluate.choose import choose_metrics, label_set

SENTENCES = ["The Punter is a cheap pub near the river and it is family friendly."] * 3
RECORDS = ["ORDER | Falridge, Elias | 49 x purple bowls | to Highbridge | by 07-04"] * 3


@pytest.mark.parametrize(
    ("references", "labels", "first"),
    [
        (['{"a": 1}', "[2]"], ("x", "y"), "json_match"),
        (["so 5\n#### 5", "#### 1,200"], None, "number_match"),
        (["yes", "no"], ("no", "yes"), "accuracy"),
        (["Paris", "the red one"], None, "exact_match"),
        (RECORDS, None, "exact_match"),
        ([], None, ""),
    ],
)
def test_primary_metric(references: list[str], labels: tuple[str, ...] | None, first: str) -> None:
    chosen = choose_metrics(references, labels)
    assert (chosen.metrics[0] if chosen.metrics else "") == first
    assert chosen.why


def test_sentences_are_scored_by_overlap_where_that_is_installed() -> None:
    pytest.importorskip("sacrebleu")
    assert choose_metrics(SENTENCES, None).metrics[0] == "chrf"


def test_labels_are_few_short_and_frequent() -> None:
    assert label_set(Counter(yes=30, no=20)) == ("no", "yes")
    assert label_set(Counter({str(i): 1 for i in range(30)})) is None
    assert label_set(Counter(yes=30)) is None
    assert label_set(Counter({"x" * 200: 30, "y": 30})) is None
    assert label_set(Counter({"two\nlines": 30, "y": 30})) is None


def test_real_sets(shared: Path) -> None:
    gsm8k = [
        json.loads(line)["answer"]
        for line in (shared / "data/gsm8k/train.jsonl").read_text("utf-8").splitlines()[:200]
    ]
    assert choose_metrics(gsm8k, None).metrics == ("number_match",)
    with (shared / "data/banking77/train.csv").open(encoding="utf-8", newline="") as stream:
        labels = label_set(Counter(row["category"] for row in csv.DictReader(stream)))
    assert labels is not None
    assert len(labels) == 77
