"""A few questions with every arm's answer: the worst ones, and some spread over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftcli.evaluate.compare import Measured
from peftcli.evaluate.questions import Item, spread
from peftcli.evaluate.result import Example
from peftcli.evaluate.rows import Asked

SHOWN = 10
WORST = 5
LONGEST = 2000


def examples_of(
    asked: Asked,
    measured: Mapping[str, Measured],
    said: Mapping[str, Mapping[str, str]],
    tuned: str,
) -> tuple[Example, ...]:
    """Ten questions; the worst have the lowest score, then the highest loss, of the tuned arm."""
    if not asked.questions:
        return ()
    primary = next(iter(measured.values()))
    values = {
        arm: dict(zip(primary.keys, primary.values(arm), strict=True)) for arm in primary.arms
    }
    loss = measured["loss"]
    nats = dict(zip(loss.keys, loss.values(tuned), strict=True))
    sign = -1 if primary.lower_is_better else 1

    def badness(item: Item) -> tuple[float, float]:
        return sign * values[tuned][item.key], -nats.get(item.key, 0.0)

    worst = sorted(asked.questions, key=badness)[:WORST]
    taken = {item.key for item in worst}
    others = [item for item in asked.questions if item.key not in taken]
    rest = spread(others, SHOWN - len(worst))
    found = [(item, "among the worst") for item in worst] + [(item, "by chance") for item in rest]
    return tuple(
        Example(
            key=item.key,
            question=asked.texts.question(item)[-LONGEST:],
            reference=asked.reference(item)[:LONGEST],
            answers={arm: answers[item.key][:LONGEST] for arm, answers in said.items()},
            scores={arm: of[item.key] for arm, of in values.items()},
            why=why,
        )
        for item, why in found
    )


def answered(results: Mapping[str, Sequence[object]], asked: Asked) -> dict[str, str]:
    """Row key -> the written answer as text."""
    found = {}
    for key, result in results.items():
        ids = result[0]
        if isinstance(ids, list | tuple):
            found[key] = asked.texts.answer(ids)
    return found
