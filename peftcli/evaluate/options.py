"""What the command line (or a recipe's `evaluation` section) asks of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftcli.errors import UsageError
from peftcli.evaluate.target import Target
from peftcli.metrics import find_metric


@dataclass(frozen=True)
class Gates:
    """Conditions that decide the exit code; each rests on a test, not on raw means."""

    fail_under: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the least score of the tuned model."""
    min_gain: float | None = None
    """The least gain over the base in the primary metric; 0 means no regression."""
    max_forgetting: float | None = None
    """The most that the loss on general text may rise, as a share of the base's."""
    max_merge_drift: float | None = None
    """The most that merging may change the loss, as a share of the adapter's."""
    require_proof: bool = False
    """Whether a condition that the rows leave open fails too."""


@dataclass(frozen=True)
class EvalOptions:
    """An evaluation; the defaults are those of `peftcli eval` without options."""

    data: tuple[str, ...] = ()
    """Files with rows to ask, instead of the recipe's held-out ones."""
    base_model: str | None = None
    """The base of an adapter whose own record of it does not hold here."""
    metrics: tuple[str, ...] = ()
    """Names of scores; chosen by what the references look like when empty."""
    metric_function: str | None = None
    """`module:function`, a score of the user's; its code is run."""
    retain: tuple[str, ...] | None = None
    """Files of text that should not be forgotten; None is the bundled text, () is none."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness: names, or YAML files."""
    task_limit: int | None = None
    """Documents of each task."""
    gates: Gates = Gates()
    against: Path | None = None
    """An earlier eval.json; a significant drop against it is a regression."""
    limit: int | None = 500
    """Rows whose answers are scored, spread over all; loss is always measured on all."""
    retain_limit: int = 200
    """Documents of each retained source."""
    max_new_tokens: int | None = None
    """The longest answer; a quarter longer than the longest reference when absent."""
    batch_tokens: int | None = None
    """Tokens in a forward pass; what the device takes well when absent."""
    max_cut: float = 0.05
    """The share of rows that may be left out because their reference is cut."""
    latency: bool = True
    """Whether first-token time and tokens per second are measured."""
    chat_template: str | None = None
    """For an adapter or model without a recipe: a template's name or file."""
    device: str = "auto"
    """For an adapter or model without a recipe: auto, cuda or cpu."""
    seed: int = 0
    """Seed of the resampling; decoding is greedy."""
    resamples: int = 10_000
    output: Path | None = None
    """Where eval.json and report.html go; the run folder, or ./eval-NAME, when absent."""
    fresh: bool = False
    """Measure again what an earlier evaluation of the same left."""
    offline: bool = False


def completed(options: EvalOptions, target: Target) -> EvalOptions:
    """What the command line leaves open, from the recipe; its gates are about a tuned model."""
    if target.loaded is None:
        return options
    own = target.loaded.recipe.evaluation
    gates, given = own.gates, options.gates
    if gates is not None and (target.adapter or target.tuned):
        drift = gates.max_merge_drift if target.merged else None
        given = Gates(
            fail_under={**gates.fail_under, **given.fail_under},
            min_gain=_first(given.min_gain, gates.min_gain),
            max_forgetting=_first(given.max_forgetting, gates.max_forgetting),
            max_merge_drift=_first(given.max_merge_drift, drift),
            require_proof=given.require_proof or gates.require_proof,
        )
    return replace(
        options,
        metrics=options.metrics or own.metrics,
        retain=options.retain if options.retain is not None else own.retain,
        max_new_tokens=options.max_new_tokens or own.max_new_tokens,
        gates=given,
    )


def _first(given: float | None, own: float | None) -> float | None:
    return given if given is not None else own


def read_limits(values: Sequence[str]) -> dict[str, float]:
    """`exact_match=0.8` or `exact_match=80%` -> limits by metric; UsageError otherwise."""
    limits = {}
    for text in values:
        name, equals, number = text.partition("=")
        if not equals:
            raise UsageError(f"--fail-under {text}: not METRIC=LIMIT", "such as exact_match=0.8")
        metric = find_metric(name.strip())
        limit = read_share(number, "--fail-under")
        if metric.percent and not 0 <= limit <= 1:
            raise UsageError(
                f"--fail-under {text}: {metric.name} lies between 0 and 1",
                f"write {name}={limit / 100:g}, or {name}={limit:g}%",
            )
        limits[metric.name] = limit
    return limits


def read_share(text: str, option: str) -> float:
    """`2%` or `0.02`; UsageError for anything else."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        raise UsageError(f"{option}: {text!r} is no number", "write 0.02 or 2%") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise UsageError(f"{option}: {text!r} is no finite number", "write 0.02 or 2%")
    return value / 100 if number.endswith("%") else value
