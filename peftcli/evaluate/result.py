"""What an evaluation found, as plain frozen data; `eval.json` is exactly this."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["better", "worse", "no measurable difference"]
Outcome = Literal["passed", "regression", "inconclusive"]
FORMAT = 1


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared."""

    name: str
    """base, adapter, tuned (all weights), merged or model."""
    what: str
    """The files, and how they are loaded."""
    identity: str
    """A hash of the weights."""
    weights_gib: float | None = None
    """What its weights take in memory, those of its base included."""


@dataclass(frozen=True)
class Score:
    """A metric of one arm with its 95 % interval."""

    metric: str
    arm: str
    rows: int
    value: float
    low: float
    high: float
    interval: Literal["wilson", "bootstrap", "reported"]


@dataclass(frozen=True)
class Difference:
    """The second arm minus the first, on the same rows."""

    metric: str
    first: str
    second: str
    rows: int
    value: float
    low: float
    high: float
    p_value: float
    """Two-sided: exact McNemar for metrics that are right or wrong, else the bootstrap."""
    verdict: Verdict
    smallest_drop: float
    """The drop that this many rows would have shown in four of five evaluations."""
    gained: int | None = None
    """Rows that only the second has right; None unless rows are right or wrong."""
    lost: int | None = None


@dataclass(frozen=True)
class Forgetting:
    """What became of text that is not about the task."""

    source: str
    documents: int
    tokens: int
    base_loss: float
    tuned_loss: float
    ratio: float
    """Loss after over loss before; 1 is nothing forgotten."""
    low: float
    high: float
    difference: Difference
    same_next_token: float
    """Share of tokens after which both would write the same next token."""
    same_answer: float
    """Share of greedy continuations that are the same to the last token."""
    shared_start: float
    """Mean share of a continuation before the first token that differs."""


@dataclass(frozen=True)
class Latency:
    """Cost of greedy generation; medians of interleaved repetitions."""

    arm: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    """All rows of the batch together, after their first token."""
    p95_token_seconds: float
    peak_gib: float | None
    """Peak of allocated GPU memory with this arm, other arms' weights left out."""
    repetitions: int
    interleaved: bool


@dataclass(frozen=True)
class Gate:
    """A condition, and what the rows say about it."""

    name: str
    outcome: Outcome
    reason: str
    """One line."""
    p_broken: float
    """One-sided p-value of the claim that it is broken, adjusted for all gates (Holm)."""
    p_kept: float
    """One-sided p-value of the claim that it is kept."""


@dataclass(frozen=True)
class Example:
    """One question with every arm's answer."""

    key: str
    question: str
    reference: str
    answers: dict[str, str]
    scores: dict[str, float]
    """The primary metric of each arm on this row."""
    why: str


@dataclass(frozen=True)
class Rows:
    """Which rows were asked, and what was checked about them."""

    source: str
    held_out: int
    """Rows whose loss is measured."""
    answered: int
    """Rows whose answers are scored."""
    tokens: int
    """Answer tokens that the loss is a mean of."""
    leaked: int | None
    """Rows left out because they are training rows too; None when that is not known."""
    cut: int
    """Rows left out of the scores because their reference is longer than `data.max_length`."""
    cut_rows: tuple[str, ...] = ()
    repeated: int = 0
    """Rows that occur twice."""
    sha256: str = ""
    """A hash of all rows and their order."""


@dataclass(frozen=True)
class Evaluation:
    """The whole report."""

    source: str
    kind: str
    arms: tuple[Arm, ...]
    rows: Rows
    primary: str
    """The metric that gates without a name are about."""
    why_metrics: str
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    forgetting: tuple[Forgetting, ...]
    latency: tuple[Latency, ...]
    gates: tuple[Gate, ...]
    examples: tuple[Example, ...]
    settings: dict[str, Any]
    """Decoding, dtype, device, seed, resamples, versions."""
    notes: tuple[str, ...]
    table: dict[str, Any] = field(repr=False)
    """Statistics of every row for `--against`: metric -> keys and one list for each arm."""
    recipe: str = field(default="", repr=False)
    losses: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    eval_losses: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    against: str = ""
    require_proof: bool = False
    seconds: float = 0.0
    written: tuple[Path, ...] = ()
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["written"] = [str(path) for path in self.written]
        return values

    def score(self, metric: str, arm: str) -> Score | None:
        """One score, if it was measured."""
        found = [one for one in self.scores if (one.metric, one.arm) == (metric, arm)]
        return found[0] if found else None
