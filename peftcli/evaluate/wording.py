"""Figures and verdicts as people read them; one place for the terminal and the page."""

from __future__ import annotations

import math

from peftcli.evaluate.result import Difference, Evaluation, Forgetting, Score
from peftcli.metrics import METRICS

PLAIN = ("loss", "chrf", "bleu")
NEVER = "no measurable difference"


def is_share(metric: str) -> bool:
    """Whether the metric is shown in per cent."""
    known = METRICS.get(metric)
    return metric not in PLAIN and (known.percent if known else metric == "ended")


def figure(metric: str, value: float, *, signed: bool = False) -> str:
    """71.3 % for shares, 79.49 for points, 0.3431 for losses."""
    sign = "+" if signed else ""
    if is_share(metric):
        return f"{round(100 * value, 1) + 0.0:{sign}.1f}" + ("" if signed else " %")
    places = 4 if abs(value) < 10 else 2
    return f"{round(value, places) + 0.0:{sign}.{places}f}"


def bar(metric: str, limit: float) -> str:
    """A limit as it was written: 80 %, or 45."""
    return f"{100 * limit:g} %" if is_share(metric) else f"{limit:g}"


def spread(metric: str, low: float, high: float, *, signed: bool = False) -> str:
    """An interval: 66.9 to 75.4."""
    parts = [figure(metric, edge, signed=signed).removesuffix(" %") for edge in (low, high)]
    return " to ".join(parts)


def p_text(p_value: float) -> str:
    """p = 0.031, or p < 0.001."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def perplexity(loss: float) -> str:
    """exp(loss), or `huge`."""
    return f"{math.exp(loss):.2f}" if loss < 15 else "huge"


def size_text(gib: float | None) -> str:
    """14.9 GiB, or 7.7 MiB for little ones; empty where it was not measured."""
    if gib is None:
        return ""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"


def headlines(evaluation: Evaluation) -> list[str]:
    """The answers to: is it better, by how much, what did it forget, is the merge the same."""
    lines = [
        line_of(one)
        for one in evaluation.differences
        if one.metric in (evaluation.primary, "loss") and one.first in ("base", "earlier")
    ]
    lines += [forgetting_line(one) for one in evaluation.forgetting]
    merged = [x for x in evaluation.differences if (x.first, x.metric) == ("adapter", "loss")]
    lines += [
        f"merged: {NEVER} in loss to the adapter ({one.value:+.2g} nats)"
        if one.verdict == NEVER
        else f"merged: loss {one.value:+.4f} nats against the adapter, which is {one.verdict}"
        for one in merged
    ]
    if not lines:
        lines = [score_line(one) for one in evaluation.scores if one.metric == evaluation.primary]
    return lines


def line_of(one: Difference) -> str:
    """One difference as a sentence."""
    unit = _unit(one.metric)
    change = (
        f"{figure(one.metric, one.value, signed=True)}{unit} "
        f"({spread(one.metric, one.low, one.high, signed=True)}, {p_text(one.p_value)})"
    )
    name = {"now": "this evaluation", "earlier": "the earlier report"}
    second, first = name.get(one.second, one.second), name.get(one.first, one.first)
    if one.verdict == NEVER:
        return (
            f"{one.metric}: {NEVER} between {first} and {second}, {change}; "
            f"{one.rows} rows show drops from {drop_text(one)} on"
        )
    return f"{one.metric}: {second} is {one.verdict} than {first}, {change}"


def drop_text(one: Difference) -> str:
    """The smallest drop that so many rows would have shown."""
    return figure(one.metric, one.smallest_drop).removesuffix(" %") + _unit(one.metric)


def _unit(metric: str) -> str:
    return " points" if is_share(metric) else " nats" if metric == "loss" else ""


def forgetting_line(one: Forgetting) -> str:
    """What became of one source of retained text."""
    change = f"{one.ratio - 1:+.1%} ({one.low - 1:+.1%} to {one.high - 1:+.1%})"
    kept = f"the same next token after {one.same_next_token:.0%} of the text"
    verdict = {
        "worse": f"forgetting: loss on {one.source} rises by {change}",
        "better": f"forgetting: none, loss on {one.source} even falls by {change}",
        NEVER: f"forgetting: {NEVER} in loss on {one.source}, {change}",
    }[one.difference.verdict]
    return f"{verdict}; {kept}"


def score_line(one: Score) -> str:
    """One score as a sentence."""
    return (
        f"{one.metric} of {one.arm}: {figure(one.metric, one.value)} "
        f"({spread(one.metric, one.low, one.high)}, {one.rows} rows)"
    )
