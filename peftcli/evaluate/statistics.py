"""Intervals and tests for scores and for their differences on the same rows.

Everything is seeded and exact where an exact test exists. NumPy is imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95
POWER = 0.80
RESAMPLES = 10_000
MOST_DRAWS = 50_000_000
"""Rows times resamples; more rows get fewer resamples, because their sums vary less."""


def wilson(right: float, rows: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval of a share (Wilson, 1927): 0 of 20 is 0 to 16 %, not 0 +- 0."""
    if rows == 0:
        return 0.0, 1.0
    z = _z(0.5 + confidence / 2)
    share = right / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + (z / (2 * rows)) ** 2)
    # At the edges the two terms are equal, which rounding hides.
    low = 0.0 if right == 0 else max(0.0, middle - half)
    return low, 1.0 if right == rows else min(1.0, middle + half)


def binomial_at_most(right: int, rows: int, share: float) -> float:
    """P(X <= right) for X binomial."""
    if share <= 0 or share >= 1:
        return float(right >= rows * share)
    logs = [_log_binomial(k, rows, share) for k in range(right + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value for rows that only one of two models has right."""
    return min(1.0, 2 * binomial_at_most(min(gained, lost), gained + lost, 0.5))


def fewer_gained(gained: int, lost: int) -> float:
    """One-sided exact p-value that as few gains as these come from equal models."""
    return binomial_at_most(gained, gained + lost, 0.5)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being the smallest of several (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def unseen_share(rows: int, confidence: float = CONFIDENCE) -> float:
    """The largest share of rows with a property that none of `rows` has, at `confidence`."""
    return float(1 - (1 - confidence) ** (1 / rows))


@dataclass(frozen=True)
class Bootstrap:
    """An estimate and its seeded resamples, spread for the size of the sample.

    Percentile intervals are too narrow for few rows; the resamples are moved away from the
    estimate by sqrt(n / (n - 1)) and by the ratio of the t to the normal quantile
    (Hesterberg, 2015, arXiv 1411.5279).
    """

    estimate: float
    samples: Any
    """Sorted float64, one for each resample."""

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The percentile interval."""
        import numpy as np

        tail = 100 * (1 - confidence) / 2
        low, high = np.percentile(self.samples, (tail, 100 - tail))
        return float(low), float(high)

    def p_below(self, limit: float) -> float:
        """One-sided p-value of the claim that the truth is below `limit`."""
        return (1 + int((self.samples >= limit).sum())) / (1 + len(self.samples))

    def p_above(self, limit: float) -> float:
        """One-sided p-value of the claim that the truth is above `limit`."""
        return (1 + int((self.samples <= limit).sum())) / (1 + len(self.samples))

    def p_differs(self, limit: float = 0.0) -> float:
        """Two-sided p-value of the claim that the truth is not `limit`."""
        return min(1.0, 2 * min(self.p_below(limit), self.p_above(limit)))

    def error(self) -> float:
        """The standard error."""
        return float(self.samples.std())


def bootstrap(rows: Any, contrast: Any, seed: int, resamples: int = RESAMPLES) -> Bootstrap:
    """Resample whole rows; `rows` is (n, k), `contrast` turns sums (..., k) into numbers (...).

    For a paired comparison each row holds the statistics of both models.
    """
    import numpy as np

    rows = np.asarray(rows, dtype=np.float64)
    count = len(rows)
    times = max(200, min(resamples, MOST_DRAWS // count))
    draw = np.random.Generator(np.random.PCG64(seed))
    sums = np.empty((times, rows.shape[1]))
    step = max(1, 2_000_000 // count)
    for start in range(0, times, step):
        chosen = draw.integers(0, count, size=(min(step, times - start), count))
        weights = _counts(chosen, count)
        sums[start : start + step] = weights @ rows
    estimate = float(contrast(rows.sum(0)))
    with np.errstate(all="ignore"):
        samples = np.asarray(contrast(sums), dtype=np.float64)
    samples = np.sort(samples[np.isfinite(samples)])
    return Bootstrap(estimate, estimate + (samples - estimate) * _spread(count))


def smallest_drop(error: float) -> float:
    """The drop that a one-sided test at 5 % would have seen in four of five such evaluations."""
    return (_z(CONFIDENCE) + _z(POWER)) * error


def _counts(chosen: Any, count: int) -> Any:
    """Row numbers (times, n) -> how often each of `count` rows occurs, (times, count)."""
    import numpy as np

    times = len(chosen)
    flat = chosen + np.arange(times)[:, None] * count
    return np.bincount(flat.ravel(), minlength=times * count).reshape(times, count).astype(float)


def _spread(rows: int) -> float:
    if rows < 2:
        return 1.0
    z, freedom = _z(0.5 + CONFIDENCE / 2), rows - 1
    # Cornish-Fisher expansion of Student's quantile.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return math.sqrt(rows / freedom) * t / z


def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)


def _log_binomial(k: int, n: int, share: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(share) + (n - k) * math.log1p(-share)
