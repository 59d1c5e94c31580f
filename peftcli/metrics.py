"""METRICS: name -> how an answer is scored against its reference.

A metric turns one row into a few numbers, its statistics, and the sums of those over any set of
rows into a score. So a mean, a macro F1 and a corpus BLEU all get their intervals from one
bootstrap. A new metric is one function and one entry in METRICS.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from typing import Any, Literal

from peftcli.errors import UsageError
from peftcli.overlap import bleu, bleu_total, chrf, chrf_total, rouge_l

Statistics = tuple[float, ...]
Total = Callable[[Any], Any]
"""Sums (..., k) as a NumPy array -> scores (...), higher is better."""


@dataclass(frozen=True)
class Metric:
    """A score; `measure(prediction, reference)` gives the statistics of one row."""

    name: str
    measure: Callable[[str, str], Statistics]
    total: Total
    binary: bool = True
    """Whether a row is either right or wrong, so that exact tests apply."""
    of: Literal["answer", "choice", "choice_norm"] = "answer"
    """What is scored: the written answer, or the label with the highest likelihood, as a whole or
    per byte."""
    percent: bool = True
    """Whether scores lie between 0 and 1."""


def find_metric(name: str) -> Metric:
    """The metric of that name, or `regex:PATTERN`; UsageError with the nearest name."""
    if name.startswith("regex:"):
        return regex_metric(name.removeprefix("regex:"))
    if name in METRICS:
        return METRICS[name]
    near = get_close_matches(name, METRICS, n=1, cutoff=0.4)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(
        f"metric {name!r} is not known{guess}",
        f"there are {', '.join(METRICS)}, and regex:PATTERN",
    )


def check_installed(metrics: Sequence[Metric]) -> None:
    """Raise ResourceError for a metric whose library is missing."""
    for metric in metrics:
        if metric.of == "answer":
            metric.measure("a", "a")


def mean(sums: Any) -> Any:
    """Rows that count, over all rows."""
    return sums[..., 0] / sums[..., 1]


def words(text: str) -> str:
    """The text with one blank between words and in Unicode's composed form."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(prediction: str, reference: str) -> Statistics:
    """Equal apart from white space."""
    return float(words(prediction) == words(reference)), 1.0


def exact_match_loose(prediction: str, reference: str) -> Statistics:
    """Equal apart from white space, case and punctuation."""
    return float(_bare(prediction) == _bare(reference)), 1.0


def number_match(prediction: str, reference: str) -> Statistics:
    """The last number is the reference's, by value: 1,200.0 is 1200 (the usual GSM8K score)."""
    wanted = last_number(reference)
    return float(wanted is not None and last_number(prediction) == wanted), 1.0


def json_valid(prediction: str, reference: str) -> Statistics:
    """The whole answer is a JSON object or list; a code fence around it is allowed."""
    return float(read_json(prediction) is not None), 1.0


def json_match(prediction: str, reference: str) -> Statistics:
    """The same JSON value, whatever its spacing and order of keys."""
    wanted = read_json(reference)
    return float(wanted is not None and read_json(prediction) == wanted), 1.0


def json_fields(prediction: str, reference: str) -> Statistics:
    """The share of the reference's fields, at any depth, that the answer has with its value."""
    wanted, found = _fields(read_json(reference)), _fields(read_json(prediction))
    right = sum(path in found and found[path] == value for path, value in wanted.items())
    return right / max(1, len(wanted)), 1.0


def same_label(prediction: str, reference: str) -> Statistics:
    """The chosen label is the right one."""
    return float(prediction == reference), 1.0


def regex_metric(pattern: str) -> Metric:
    """The last match of `pattern`, or its first group, is what the reference has there."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"metric regex:{pattern}: {error}", "write a Python regex") from None

    def matched(text: str) -> str | None:
        found = list(compiled.finditer(text))
        if not found:
            return None
        return words(found[-1].group(1 if compiled.groups else 0) or "")

    def measure(prediction: str, reference: str) -> Statistics:
        wanted = matched(reference)
        return float(matched(prediction) == (words(reference) if wanted is None else wanted)), 1.0

    return Metric(f"regex:{pattern}", measure, mean)


def macro_f1(labels: Sequence[str]) -> Metric:
    """F1 of each label, averaged over the labels that occur."""
    place = {label: index for index, label in enumerate(labels)}
    size = len(labels)

    def measure(prediction: str, reference: str) -> Statistics:
        counts = [0.0] * (2 * size)  # true positives, then false positives and negatives
        if prediction == reference:
            counts[place[reference]] = 1.0
        else:
            counts[size + place[prediction]] = counts[size + place[reference]] = 1.0
        return tuple(counts)

    def total(sums: Any) -> Any:
        right, wrong = 2 * sums[..., :size], sums[..., size:]
        occurs = (right + wrong) > 0
        scores = (right / (right + wrong + ~occurs)).sum(-1)
        return scores / occurs.sum(-1)

    return Metric("macro_f1", measure, total, binary=False, of="choice")


def function_metric(name: str, function: Callable[[str, str], Any]) -> Metric:
    """A function of the user's: (prediction, reference) -> number or bool."""

    def measure(prediction: str, reference: str) -> Statistics:
        value = function(prediction, reference)
        if isinstance(value, bool | int | float) and value == value:
            return float(value), 1.0
        raise UsageError(
            f"--metric-function: {name} returned {value!r} for {prediction[:60]!r}",
            "return a number or a bool",
        )

    return Metric(name, measure, mean, binary=False, percent=False)


def last_number(text: str) -> Decimal | None:
    """The number after the last `####`, or the last number of the text."""
    _, marked, after = text.rpartition("####")
    found = NUMBER.findall(after)[:1] if marked else []
    found = found or NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def read_json(text: str) -> Any:
    """A JSON object or list, perhaps in a code fence; None when the text is something else."""
    fenced = FENCE.fullmatch(text)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _bare(text: str) -> str:
    return words(text.translate(_NO_PUNCTUATION)).casefold()


def _fields(value: Any, path: str = "") -> dict[str, Any]:
    """Leaf values by their path; an empty object or list is a leaf."""
    if isinstance(value, dict) and value:
        items = [(f"{path}.{key}", inner) for key, inner in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]
    else:
        return {path: value}
    return {at: leaf for name, inner in items for at, leaf in _fields(inner, name).items()}


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match, mean),
        Metric("exact_match_loose", exact_match_loose, mean),
        Metric("number_match", number_match, mean),
        Metric("json_valid", json_valid, mean),
        Metric("json_match", json_match, mean),
        Metric("json_fields", json_fields, mean, binary=False),
        Metric("rouge_l", rouge_l, mean, binary=False),
        Metric("chrf", chrf, chrf_total, binary=False, percent=False),
        Metric("bleu", bleu, bleu_total, binary=False, percent=False),
        Metric("accuracy", same_label, mean, of="choice"),
        Metric("accuracy_norm", same_label, mean, of="choice_norm"),
        macro_f1(()),
    )
}
