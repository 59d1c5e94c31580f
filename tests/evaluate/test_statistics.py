"""Intervals and tests against exact values, simulations and sacrebleu's own bootstrap."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from peftcli.evaluate.statistics import (
    binomial_at_most,
    bootstrap,
    fewer_gained,
    holm,
    mcnemar,
    smallest_drop,
    unseen_share,
    wilson,
)
from peftcli.metrics import METRICS, mean


def test_wilson_at_the_edges_is_not_a_point() -> None:
    assert wilson(0, 20) == (0.0, pytest.approx(0.16112516))
    assert wilson(20, 20) == (pytest.approx(0.83887484), 1.0)
    # Newcombe, 1998, Statistics in Medicine 17, table I: 81 of 263.
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


@pytest.mark.parametrize(("right", "rows", "share"), [(3, 12, 0.5), (0, 20, 0.1), (60, 400, 0.2)])
def test_the_binomial_is_exact(right: int, rows: int, share: float) -> None:
    p = Fraction(share).limit_denominator(1000)
    exact = sum(math.comb(rows, k) * p**k * (1 - p) ** (rows - k) for k in range(right + 1))
    assert binomial_at_most(right, rows, share) == pytest.approx(float(exact), rel=1e-9)


def test_mcnemar_is_the_exact_one() -> None:
    assert mcnemar(3, 12) == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert fewer_gained(2, 10) == pytest.approx(sum(math.comb(12, k) for k in range(3)) / 2**12)


def test_holm_adjusts_in_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), 0.06]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_nothing_seen_in_twenty_rows_may_still_be_one_in_seven() -> None:
    assert unseen_share(20) == pytest.approx(0.1391, abs=1e-4)


@pytest.mark.parametrize("rows", [8, 30, 200])
def test_the_bootstrap_covers_the_truth(rows: int) -> None:
    """Skewed per-row values with mean 1; a plain percentile interval covers 85 % at 8 rows."""
    hits = 0
    for seed in range(300):
        draw = random.Random(seed)
        values = [(draw.gammavariate(2, 0.5), 1.0) for _ in range(rows)]
        low, high = bootstrap(values, mean, seed, 600).interval()
        hits += low <= 1 <= high
    assert hits / 300 > (0.90 if rows == 8 else 0.92)


def test_the_same_seed_gives_the_same_interval() -> None:
    rows = [(float(i % 7), 1.0) for i in range(50)]
    assert bootstrap(rows, mean, 3).interval() == bootstrap(rows, mean, 3).interval()
    assert bootstrap(rows, mean, 3).interval() != bootstrap(rows, mean, 4).interval()


def test_many_rows_take_fewer_resamples_and_stay_quick() -> None:
    rows = np.ones((200_000, 2))
    rows[::2, 0] = 0
    found = bootstrap(rows, mean, 0)
    assert len(found.samples) == 250
    assert found.error() == pytest.approx(0.5 / 200_000**0.5, rel=0.25)


def test_one_row_has_no_width_but_no_crash() -> None:
    assert bootstrap([(1.0, 1.0)], mean, 0).interval() == (1.0, 1.0)


def test_p_values_are_never_zero() -> None:
    found = bootstrap([(1.0, 1.0)] * 30, mean, 0, 1000)
    assert found.p_above(0) == pytest.approx(1 / 1001)
    assert found.p_below(0) == 1.0
    assert found.p_differs(1.0) == 1.0


def test_smallest_drop_is_seen_in_four_of_five() -> None:
    rows, seen = 100, 0
    drop = smallest_drop(1 / rows**0.5)
    for seed in range(400):
        draw = np.random.default_rng(seed)
        seen += draw.normal(-drop, 1, rows).mean() < -1.645 / rows**0.5
    assert 0.74 < seen / 400 < 0.86


def test_intervals_of_corpus_scores_are_those_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    draw = random.Random(5)
    sentence = "the cat sat on a mat near my house and it was very big"
    words = sentence.split()
    references = [" ".join(draw.choices(words, k=12)) for _ in range(150)]
    answers = [
        " ".join(w if draw.random() < 0.8 else draw.choice(words) for w in text.split())
        for text in references
    ]
    for name, kind in (("bleu", sacrebleu.BLEU), ("chrf", sacrebleu.CHRF)):
        metric = METRICS[name]
        rows = [metric.measure(a, r) for a, r in zip(answers, references, strict=True)]
        found = bootstrap(rows, metric.total, 1, 1000)
        theirs = kind(references=[references]).corpus_score(answers, None, n_bootstrap=1000)
        low, high = found.interval()
        # sacrebleu gives half the width of its 95 % interval as `_ci`.
        assert found.estimate == pytest.approx(theirs.score, abs=1e-9)
        assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.15)
