"""Forgetting: loss and greedy choices on text that is not about the task, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftcli.evaluate.compare import LOSS, Measured, difference_of, ratio
from peftcli.evaluate.questions import Item
from peftcli.evaluate.result import Forgetting


@dataclass(frozen=True)
class Retained:
    """What both arms make of one source."""

    source: str
    losses: Measured
    greedy: Mapping[str, Sequence[Sequence[int]]]
    """Arm -> for each document, the best token in every place."""
    continued: Mapping[str, Sequence[Sequence[int]]]
    """Arm -> for each document, the greedy continuation of its first half."""


def retained(
    source: str, losses: Mapping[str, Mapping[str, Any]], continued: Mapping[str, Mapping[str, Any]]
) -> Retained:
    """Results by arm and row key, brought together."""
    keys = tuple(next(iter(losses.values())))
    measured = Measured(
        LOSS,
        keys,
        {
            arm: [(float(of[key][0]), float(of[key][1])) for key in keys]
            for arm, of in losses.items()
        },
    )
    return Retained(
        source,
        measured,
        {arm: [of[key][2] for key in keys] for arm, of in losses.items()},
        {arm: [row[0] for row in of.values()] for arm, of in continued.items()},
    )


def halves(items: Sequence[Item]) -> list[Item]:
    """Prompts to go on from: the question of a row, or the first half of a text."""
    return [
        item if item.start else replace(item, start=max(1, len(item.ids) // 2)) for item in items
    ]


def forgetting_of(found: Retained, tuned: str, seed: int, resamples: int) -> Forgetting:
    """Ratio of losses with its interval, and how often both still choose the same."""
    measured = found.losses
    change = ratio(measured, "base", tuned, seed, resamples)
    low, high = change.interval()
    pairs = list(zip(found.greedy["base"], found.greedy[tuned], strict=True))
    tokens = sum(len(before) for before, _ in pairs)
    same = sum(a == b for before, after in pairs for a, b in zip(before, after, strict=True))
    answers = list(zip(found.continued["base"], found.continued[tuned], strict=True))
    return Forgetting(
        source=found.source,
        documents=len(measured.keys),
        tokens=tokens,
        base_loss=_loss(measured, "base"),
        tuned_loss=_loss(measured, tuned),
        ratio=change.estimate,
        low=low,
        high=high,
        difference=difference_of(measured, "base", tuned, seed, resamples),
        same_next_token=same / max(1, tokens),
        same_answer=sum(list(a) == list(b) for a, b in answers) / max(1, len(answers)),
        shared_start=sum(_shared(a, b) for a, b in answers) / max(1, len(answers)),
    )


def _loss(measured: Measured, arm: str) -> float:
    rows = measured.arms[arm]
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def _shared(before: Sequence[int], after: Sequence[int]) -> float:
    """The share of the longer text before the first token that differs."""
    longest = max(len(before), len(after))
    if longest == 0:
        return 1.0
    same = zip(before, after, strict=False)
    return (
        next((i for i, (a, b) in enumerate(same) if a != b), min(len(before), len(after))) / longest
    )
