"""Answers and likelihoods -> the statistics of every metric on every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.errors import UsageError
from peftcli.evaluate.check import load_function
from peftcli.evaluate.choose import choose_metrics, label_set
from peftcli.evaluate.compare import LOSS, Measured
from peftcli.evaluate.options import EvalOptions
from peftcli.evaluate.questions import Item
from peftcli.evaluate.rows import Asked
from peftcli.metrics import Metric, find_metric, macro_f1


@dataclass(frozen=True)
class Scoring:
    """The metrics of an evaluation, the primary one first."""

    metrics: tuple[Metric, ...]
    labels: tuple[str, ...]
    """The classes, where the likelihoods of a closed set are compared."""
    why: str

    @property
    def writes(self) -> bool:
        """Whether answers must be written."""
        return any(metric.of == "answer" for metric in self.metrics)

    @property
    def chooses(self) -> bool:
        """Whether likelihoods must be compared."""
        return any(metric.of != "answer" for metric in self.metrics)


def scoring_of(asked: Asked, options: EvalOptions) -> Scoring:
    """The metrics the user named, or those that suit the rows; UsageError when they cannot be."""
    references = [asked.reference(item) for item in asked.questions]
    labels = label_set(asked.answers.counts) if asked.answers is not None else None
    names, why = options.metrics, "named"
    if not names and asked.options:
        names, why = ("accuracy", "accuracy_norm"), "the rows bring their own choices"
    elif not names:
        chosen = choose_metrics(references, labels)
        names, why = chosen.metrics, chosen.why
    named = list(dict.fromkeys((*names, *options.gates.fail_under)))
    if named and not references:
        raise UsageError(
            f"metric {named[0]}: the rows are plain text without questions and answers",
            "leave the metrics out; loss and perplexity are measured",
        )
    metrics = [find_metric(name) for name in named]
    if options.metric_function:
        metrics.append(load_function(options.metric_function))
    classes = _classes(metrics, asked, labels)
    metrics = [macro_f1(classes) if one.name == "macro_f1" else one for one in metrics]
    return Scoring(tuple(metrics), classes, why)


def _classes(
    metrics: Sequence[Metric], asked: Asked, labels: tuple[str, ...] | None
) -> tuple[str, ...]:
    choosing = [metric.name for metric in metrics if metric.of != "answer"]
    if not choosing or (asked.options and "macro_f1" not in choosing):
        return ()
    if asked.options:
        raise UsageError("metric macro_f1: the rows bring choices of their own", "use accuracy")
    if labels is None and asked.answers is None:
        raise UsageError(
            f"metric {choosing[0]}: the rows have more than 1,000 different answers",
            "it is for labels; use exact_match",
        )
    return labels or tuple(sorted(asked.answers.counts if asked.answers else ()))


def measured_scores(
    scoring: Scoring,
    asked: Asked,
    losses: Mapping[str, Mapping[str, Any]],
    said: Mapping[str, Mapping[str, str]],
    likelihoods: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Measured]:
    """Metric -> statistics by arm, the loss last; every argument is arm -> row key -> result."""
    keys = tuple(item.key for item in asked.questions)
    found: dict[str, Measured] = {}
    for metric in scoring.metrics:
        arms = {}
        for arm in losses:
            rows = []
            for item in asked.questions:
                pair = (said[arm][item.key], asked.reference(item))
                if metric.of != "answer":
                    scores = likelihoods[arm][item.key]
                    pair = chosen(scores, item, asked, scoring, metric.of == "choice_norm")
                rows.append(metric.measure(*pair))
            arms[arm] = rows
        found[metric.name] = Measured(metric, keys, arms)
    every = tuple(item.key for item in asked.items)
    nats = {
        arm: [(float(of[key][0]), float(of[key][1])) for key in every] for arm, of in losses.items()
    }
    found[LOSS.name] = Measured(LOSS, every, nats)
    return found


def chosen(
    scores: Sequence[float], item: Item, asked: Asked, scoring: Scoring, per_byte: bool
) -> tuple[str, str]:
    """The candidate with the highest likelihood, and the right one."""
    texts = candidate_texts(item, asked, scoring)
    if per_byte:
        scores = [
            score / max(1, len(text.encode())) for score, text in zip(scores, texts, strict=True)
        ]
    best = max(range(len(texts)), key=scores.__getitem__)
    return texts[best], asked.reference(item)


def candidate_texts(item: Item, asked: Asked, scoring: Scoring) -> tuple[str, ...]:
    """What can be answered to a question."""
    if item.key in asked.options:
        return tuple(asked.reference(one) for one in asked.options[item.key])
    return scoring.labels


def candidates(asked: Asked, scoring: Scoring) -> Any:
    """Token ids of the labels, or of each question's own choices by its key."""
    if asked.options:
        return {key: [list(one.answer) for one in some] for key, some in asked.options.items()}
    tokens = asked.answers.tokens if asked.answers is not None else {}
    return [list(tokens[label]) for label in scoring.labels]
