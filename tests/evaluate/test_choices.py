"""Multiple choice rows in their usual forms, and asked of a real model."""

from __future__ import annotations

from pathlib import Path

import pytest
from colours import write_rows

from peftcli.data.messages import RowError
from peftcli.errors import DataError, UsageError
from peftcli.evaluate.check import check
from peftcli.evaluate.choices import choice_row
from peftcli.evaluate.options import EvalOptions
from peftcli.evaluate.run import run

ARC = {"text": ["a fish", "a stone"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "q", "choices": ["x", "y", "z"], "answer": 2}, 2),
        ({"question": "q", "choices": ["x", "y", "z"], "answer": "2"}, 2),
        ({"question": "q", "choices": ["x", "y", "z"], "answer": "B"}, 1),
        ({"question": "q", "choices": ["x", "y", "z"], "gold": "z"}, 2),
        ({"prompt": "q", "choices": ["3", "1", "2"], "answer": "1"}, 1),
        ({"question": "q", "choices": ARC, "answerKey": "B"}, 1),
        ({"question": "q", "choices": {**ARC, "label": ["1", "2"]}, "answerKey": "1"}, 0),
    ],
)
def test_the_right_choice(row: dict[str, object], right: int) -> None:
    assert choice_row(row).right == right


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "none of the 2 choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": -1}, "none of the 2 choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": "\u00b2"}, "none of the 2 choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": "C"}, "none of the 2 choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": "maybe"}, "none of the 2"),
        ({"question": "q", "choices": ["x", "y"], "answer": True}, "a boolean"),
        ({"question": "q", "choices": ["x", "y"]}, "the answer is null"),
        ({"question": "q", "choices": ["x", "x"], "answer": 0}, "two different"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "two different"),
        ({"question": "q", "choices": "xy", "answer": 0}, "list of texts"),
        ({"question": "", "choices": ["x", "y"], "answer": 0}, "the question is"),
    ],
)
def test_rows_that_cannot_be_asked(row: dict[str, object], message: str) -> None:
    with pytest.raises(RowError, match=message):
        choice_row(row)


def test_bad_rows_are_listed_before_anything_is_loaded(colour_run: Path, tmp_path: Path) -> None:
    good: dict[str, object] = {"question": "q", "choices": ["x", "y"], "answer": 0}
    file = write_rows(tmp_path / "rows.jsonl", [good, {**good, "answer": 7}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer 7"):
        check(colour_run, EvalOptions(data=(str(file),)))


def test_a_model_that_knows_chooses_right(colour_run: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": f"{i} apple", "choices": ["green", "red", "grey"][: 2 + i % 2], "answer": 1}
        for i in range(200, 212)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    options = EvalOptions(data=(str(file),), latency=False, resamples=200, retain=())
    found = run(colour_run, options, lambda event: None)
    assert found.primary == "accuracy"
    for metric in ("accuracy", "accuracy_norm"):
        score = found.score(metric, "adapter")
        assert score is not None
        assert score.value == 1.0
    assert found.examples[0].reference == "red"
    wrong = EvalOptions(data=(str(file),), latency=False, metrics=("macro_f1",))
    with pytest.raises(UsageError, match="choices of their own"):
        run(colour_run, wrong, lambda event: None)
