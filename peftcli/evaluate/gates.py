"""Gates: conditions on scores that fail only when the rows show that they are broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftcli.errors import Inconclusive, RegressionFound
from peftcli.evaluate.compare import ALPHA, Measured, discordant, paired, ratio, score_of
from peftcli.evaluate.options import Gates
from peftcli.evaluate.result import Evaluation, Gate, Outcome
from peftcli.evaluate.statistics import (
    RESAMPLES,
    Bootstrap,
    binomial_at_most,
    bootstrap,
    fewer_gained,
    holm,
    unseen_share,
)
from peftcli.evaluate.wording import bar, figure, spread


@dataclass(frozen=True)
class Claim:
    """A condition before the correction for being one of several."""

    name: str
    p_broken: float
    p_kept: float
    found: str
    """The figures, as the subject of a sentence."""
    limit: str
    rows: int


@dataclass(frozen=True)
class Ground:
    """What gates look at."""

    scores: Mapping[str, Measured]
    """Metric -> rows; the first one is the primary metric."""
    retained: Sequence[Measured]
    tuned: str
    """The arm that gates are about."""
    earlier: Measured | None = None
    """The primary metric now and in an earlier report: arms `earlier` and `now`."""
    seed: int = 0
    resamples: int = RESAMPLES


def judge(gates: Gates, ground: Ground) -> tuple[Gate, ...]:
    """Every gate with its outcome; p-values of breaking are adjusted together (Holm)."""
    claims = [_least(ground, name, limit) for name, limit in gates.fail_under.items()]
    primary = next(iter(ground.scores.values()))
    if gates.min_gain is not None and "base" in primary.arms:
        claims.append(_gain(ground, primary, "base", ground.tuned, gates.min_gain))
    if gates.max_forgetting is not None:
        claims += [_forgetting(ground, one, gates.max_forgetting) for one in ground.retained]
    if gates.max_merge_drift is not None:
        claims.append(_drift(ground, gates.max_merge_drift))
    if ground.earlier is not None:
        claims.append(_gain(ground, ground.earlier, "earlier", "now", 0.0))
    adjusted = holm([claim.p_broken for claim in claims])
    return tuple(_gate(claim, p) for claim, p in zip(claims, adjusted, strict=True))


def enforce(evaluation: Evaluation) -> None:
    """Raise RegressionFound for broken gates, Inconclusive for open ones that must be proven."""
    broken = [gate for gate in evaluation.gates if gate.outcome == "regression"]
    unclear = [gate for gate in evaluation.gates if gate.outcome == "inconclusive"]
    if broken:
        raise RegressionFound("; ".join(gate.reason for gate in broken))
    if unclear and evaluation.require_proof:
        raise Inconclusive(
            "; ".join(gate.reason for gate in unclear),
            "evaluate more rows (--limit 0 takes all), or leave out --require-proof",
        )


def _gate(claim: Claim, p_broken: float) -> Gate:
    outcome: Outcome = "inconclusive"
    reason = f"{claim.found}: {claim.rows} rows cannot tell whether it is {claim.limit}"
    if p_broken < ALPHA:
        outcome, reason = "regression", f"{claim.found}, which is {claim.limit}"
    elif claim.p_kept < ALPHA:
        outcome, reason = "passed", f"{claim.found}, which is not {claim.limit}"
    return Gate(claim.name, outcome, reason, p_broken, claim.p_kept)


def _least(ground: Ground, name: str, limit: float) -> Claim:
    measured, arm = ground.scores[name], ground.tuned
    rows = measured.arms[arm]
    score = score_of(measured, arm, ground.seed, ground.resamples)
    if measured.metric.binary:
        right = round(sum(row[0] for row in rows))
        broken = binomial_at_most(right, len(rows), limit)
        kept = 1 - binomial_at_most(right - 1, len(rows), limit) if right else 1.0
    else:
        found = bootstrap(rows, measured.metric.total, ground.seed, ground.resamples)
        broken, kept = found.p_below(limit), found.p_above(limit)
    edges = spread(name, score.low, score.high)
    shown = f"{name} of {arm} is {figure(name, score.value)} ({edges})"
    limited = f"below {bar(name, limit)}"
    return Claim(f"fail_under {name}", broken, kept, shown, limited, len(rows))


def _gain(ground: Ground, measured: Measured, first: str, second: str, limit: float) -> Claim:
    found = paired(measured, first, second, ground.seed, ground.resamples)
    low, high = found.interval()
    count, value = len(measured.keys), found.estimate
    if measured.lower_is_better:
        broken, kept = found.p_above(-limit), found.p_below(-limit)
        value, low, high = -value, -high, -low
    else:
        broken, kept = found.p_below(limit), found.p_above(limit)
    if measured.metric.binary:
        gained, lost = discordant(measured, first, second)
        if limit == 0:
            broken, kept = fewer_gained(gained, lost), fewer_gained(lost, gained)
        elif gained + lost == 0:  # no resample differs, but other rows might
            unseen = (1 - min(1.0, abs(limit))) ** count
            broken, kept = (unseen, 1.0) if limit > 0 else (1.0, unseen)
        if gained + lost == 0:
            low, high = -unseen_share(count), unseen_share(count)
    title = measured.metric.name
    gain, edges = figure(title, value, signed=True), spread(title, low, high, signed=True)
    what = f"{title} gains {gain} ({edges})"
    name = "against" if first == "earlier" else "min_gain"
    shown = f"{what} over {'the earlier report' if first == 'earlier' else first}"
    return Claim(name, broken, kept, shown, f"below {bar(title, limit)}", count)


def _forgetting(ground: Ground, measured: Measured, limit: float) -> Claim:
    found = ratio(measured, "base", ground.tuned, ground.seed, ground.resamples)
    return Claim(
        "max_forgetting",
        found.p_above(1 + limit),
        found.p_below(1 + limit),
        f"the loss on retained text changes by {_percent(found)}",
        f"above {limit:.2%}",
        len(measured.keys),
    )


def _drift(ground: Ground, limit: float) -> Claim:
    measured = ground.scores["loss"]
    found = ratio(measured, ground.tuned, "merged", ground.seed, ground.resamples)
    above, below = 1 + limit, 1 / (1 + limit)
    return Claim(
        "max_merge_drift",
        min(1.0, 2 * min(found.p_above(above), found.p_below(below))),
        max(found.p_below(above), found.p_above(below)),
        f"merging changes the loss by {_percent(found)}",
        f"beyond {limit:.2%}",
        len(measured.keys),
    )


def _percent(ratio: Bootstrap) -> str:
    low, high = ratio.interval()
    return f"{ratio.estimate - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})"
