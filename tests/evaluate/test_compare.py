"""Differences: what they are called, and which test they rest on."""

from __future__ import annotations

import pytest

from peftcli.evaluate.compare import LOSS, Measured, difference_of, ratio, score_of
from peftcli.metrics import METRICS, macro_f1


def exact(base: str, adapter: str) -> Measured:
    """Rows as strings of 1 and 0."""
    arms = {
        name: [(float(row), 1.0) for row in rows]
        for name, rows in (("base", base), ("adapter", adapter))
    }
    return Measured(METRICS["exact_match"], tuple(map(str, range(len(base)))), arms)


def test_a_difference_inside_its_interval_is_none() -> None:
    found = difference_of(exact("10" * 20, "01" * 19 + "11"), "base", "adapter", 0)
    assert (found.gained, found.lost) == (20, 19)
    assert found.verdict == "no measurable difference"
    assert found.p_value == 1.0
    assert found.low < 0 < found.high


def test_better_and_worse() -> None:
    assert difference_of(exact("0" * 20, "1" * 20), "base", "adapter", 0).verdict == "better"
    assert difference_of(exact("1" * 20, "0" * 20), "base", "adapter", 0).verdict == "worse"


def test_the_exact_test_has_the_last_word() -> None:
    """Five gains and no loss: every resample is positive, yet p is 0.06."""
    found = difference_of(exact("0" * 40, "1" * 5 + "0" * 35), "base", "adapter", 0)
    assert found.low > 0
    assert found.p_value == pytest.approx(2 / 2**5)
    assert found.verdict == "no measurable difference"


def test_equal_answers_leave_room_for_what_was_not_seen() -> None:
    found = difference_of(exact("1" * 20, "1" * 20), "base", "adapter", 0)
    assert (found.low, found.high) == (pytest.approx(-0.139, abs=1e-3), found.high)
    assert found.high == -found.low
    assert found.smallest_drop > 0.1


def test_lower_losses_are_better() -> None:
    base = [(5.0 + i % 3, 5.0) for i in range(60)]
    adapter = [(nats * 0.5, tokens) for nats, tokens in base]
    measured = Measured(LOSS, tuple(map(str, range(60))), {"base": base, "adapter": adapter})
    assert difference_of(measured, "base", "adapter", 0).verdict == "better"
    assert difference_of(measured, "adapter", "base", 0).verdict == "worse"
    assert ratio(measured, "base", "adapter", 0).estimate == pytest.approx(0.5)


def test_the_loss_weighs_rows_by_their_tokens() -> None:
    arms = {"base": [(1.0, 1.0), (18.0, 9.0)]}
    assert score_of(Measured(LOSS, ("a", "b"), arms), "base", 0).value == pytest.approx(1.9)
    assert Measured(LOSS, ("a", "b"), arms).values("base") == [1.0, 2.0]


def test_macro_f1_has_an_interval_too() -> None:
    metric = macro_f1(("a", "b"))
    truths = "ab" * 30
    rows = [metric.measure("a" if i % 5 else "b", truth) for i, truth in enumerate(truths)]
    score = score_of(Measured(metric, tuple(map(str, range(60))), {"base": rows}), "base", 0)
    assert 0 < score.low < score.value < score.high < 1
