"""Rows of statistics -> scores with intervals, differences with tests, verdicts in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.evaluate.result import Difference, Score, Verdict
from peftcli.evaluate.statistics import (
    RESAMPLES,
    Bootstrap,
    bootstrap,
    mcnemar,
    smallest_drop,
    unseen_share,
    wilson,
)
from peftcli.metrics import Metric, Statistics, mean

ALPHA = 0.05
LOSS = Metric("loss", lambda prediction, reference: (), mean, binary=False, percent=False)
"""Nats per answer token; its statistics come from the model: nats and tokens of each row."""


@dataclass(frozen=True)
class Measured:
    """One metric on the same rows for every arm."""

    metric: Metric
    keys: tuple[str, ...]
    """A name for each row, the same in every evaluation of it."""
    arms: Mapping[str, Sequence[Statistics]]

    @property
    def lower_is_better(self) -> bool:
        """Only for losses."""
        return self.metric.name == LOSS.name

    def values(self, arm: str) -> list[float]:
        """The metric of each row by itself."""
        import numpy as np

        rows = np.asarray(self.arms[arm], dtype=np.float64)
        return [float(value) for value in np.atleast_1d(self.metric.total(rows))]


def score_of(measured: Measured, arm: str, seed: int, resamples: int = RESAMPLES) -> Score:
    """The score of one arm: Wilson's interval for shares of rows, else the bootstrap's."""
    metric, rows = measured.metric, measured.arms[arm]
    if metric.binary:
        right = sum(row[0] for row in rows)
        low, high = wilson(right, len(rows))
        return Score(metric.name, arm, len(rows), right / len(rows), low, high, "wilson")
    found = bootstrap(rows, metric.total, seed, resamples)
    low, high = found.interval()
    return Score(metric.name, arm, len(rows), found.estimate, low, high, "bootstrap")


def difference_of(
    measured: Measured, first: str, second: str, seed: int, resamples: int = RESAMPLES
) -> Difference:
    """The second arm minus the first, paired by row.

    It is called better or worse only when its interval leaves out zero and, where rows are right
    or wrong, the exact test agrees.
    """
    found = paired(measured, first, second, seed, resamples)
    low, high = found.interval()
    p_value, error = found.p_differs(), found.error()
    gained = lost = None
    count = len(measured.keys)
    if measured.metric.binary:
        gained, lost = discordant(measured, first, second)
        p_value = mcnemar(gained, lost)
        if gained + lost == 0:
            unseen = unseen_share(count)
            low, high, error = -unseen, unseen, (unseen / count) ** 0.5
    return Difference(
        metric=measured.metric.name,
        first=first,
        second=second,
        rows=count,
        value=found.estimate,
        low=low,
        high=high,
        p_value=p_value,
        verdict=_verdict(found.estimate, low, high, p_value, measured.lower_is_better),
        smallest_drop=smallest_drop(error),
        gained=gained,
        lost=lost,
    )


def paired(
    measured: Measured, first: str, second: str, seed: int, resamples: int = RESAMPLES
) -> Bootstrap:
    """The bootstrap of the second arm's score minus the first's."""
    total, width = measured.metric.total, len(measured.arms[first][0])

    def contrast(sums: Any) -> Any:
        return total(sums[..., width:]) - total(sums[..., :width])

    return bootstrap(_side_by_side(measured, first, second), contrast, seed, resamples)


def ratio(
    measured: Measured, first: str, second: str, seed: int, resamples: int = RESAMPLES
) -> Bootstrap:
    """The bootstrap of the second arm's score over the first's."""
    total, width = measured.metric.total, len(measured.arms[first][0])

    def contrast(sums: Any) -> Any:
        return total(sums[..., width:]) / total(sums[..., :width])

    return bootstrap(_side_by_side(measured, first, second), contrast, seed, resamples)


def discordant(measured: Measured, first: str, second: str) -> tuple[int, int]:
    """Rows that only the second arm has right, and rows that only the first has."""
    pairs = list(zip(measured.arms[first], measured.arms[second], strict=True))
    gained = sum(new[0] > old[0] for old, new in pairs)
    return gained, sum(new[0] < old[0] for old, new in pairs)


def _side_by_side(measured: Measured, first: str, second: str) -> list[Statistics]:
    pairs = zip(measured.arms[first], measured.arms[second], strict=True)
    return [tuple(old) + tuple(new) for old, new in pairs]


def _verdict(value: float, low: float, high: float, p_value: float, lower: bool) -> Verdict:
    if p_value >= ALPHA or low <= 0 <= high:
        return "no measurable difference"
    return "better" if (value < 0) == lower else "worse"
