"""Gates on simulated models: equal ones rarely alarm, real drops are caught, few rows stay open."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from peftcli.errors import ExitCode, Inconclusive, RegressionFound
from peftcli.evaluate.compare import LOSS, Measured
from peftcli.evaluate.gates import Ground, enforce, judge
from peftcli.evaluate.options import Gates, read_limits, read_share
from peftcli.evaluate.result import Evaluation, Gate, Rows
from peftcli.metrics import METRICS, Statistics

SEEDS = 200
CHURN = 0.10


def binary(pairs: Sequence[tuple[bool, bool]], name: str = "exact_match") -> Measured:
    keys = tuple(map(str, range(len(pairs))))
    base = [(float(old), 1.0) for old, _ in pairs]
    return Measured(
        METRICS[name], keys, {"base": base, "adapter": [(float(new), 1.0) for _, new in pairs]}
    )


def churned(seed: int, rows: int, drop: float, accuracy: float = 0.7) -> Measured:
    """Two models: `CHURN` of the rows change sides by chance, and `drop` of them are lost."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(rows):
        old = draw.random() < accuracy
        # Flips up and down are equally many on average, so that the accuracy stays.
        flip = draw.random() < (CHURN / 2) / (accuracy if old else 1 - accuracy)
        new = old != flip
        pairs.append((old, new and draw.random() >= drop / accuracy))
    return binary(pairs)


def losses(seed: int, rows: int, worse: float) -> Measured:
    draw = random.Random(seed)
    base: list[Statistics] = []
    tuned: list[Statistics] = []
    for _ in range(rows):
        tokens = float(draw.randint(4, 60))
        nats = tokens * draw.lognormvariate(0, 0.6)
        base.append((nats, tokens))
        tuned.append((nats * draw.lognormvariate(-0.0113, 0.15) * (1 + worse), tokens))
    return Measured(LOSS, tuple(map(str, range(rows))), {"base": base, "adapter": tuned})


def alarm(gates: Gates, *measured: Measured, seed: int, retained: Sequence[Measured] = ()) -> bool:
    scores = {one.metric.name: one for one in measured}
    ground = Ground(scores, retained, "adapter", seed=seed, resamples=1000)
    return any(gate.outcome == "regression" for gate in judge(gates, ground))


@pytest.mark.parametrize("rows", [50, 200, 500])
def test_equal_models_rarely_alarm(rows: int) -> None:
    alarms = [
        alarm(Gates(min_gain=0), churned(seed, rows, drop=0), seed=seed) for seed in range(SEEDS)
    ]
    assert sum(alarms) <= 0.075 * SEEDS


@pytest.mark.parametrize("rows", [12, 200])
def test_equal_losses_rarely_alarm(rows: int) -> None:
    gates = Gates(min_gain=0, max_forgetting=0)
    alarms = []
    for seed in range(SEEDS):
        retained = [losses(seed + 10_000, rows, worse=0)]
        alarms.append(alarm(gates, losses(seed, rows, worse=0), seed=seed, retained=retained))
    assert sum(alarms) <= 0.075 * SEEDS


def test_several_gates_together_still_rarely_alarm() -> None:
    gates = Gates(fail_under={"exact_match": 0.7}, min_gain=0, max_forgetting=0)
    alarms = []
    for seed in range(SEEDS):
        retained = [losses(seed + 10_000, 200, worse=0)]
        alarms.append(alarm(gates, churned(seed, 200, drop=0), seed=seed, retained=retained))
    assert sum(alarms) <= 0.075 * SEEDS


def test_a_drop_of_ten_points_in_500_rows_is_caught() -> None:
    caught = [
        alarm(Gates(min_gain=0), churned(seed, 500, drop=0.10), seed=seed) for seed in range(SEEDS)
    ]
    assert sum(caught) >= 0.95 * SEEDS


def test_a_raw_threshold_would_have_cried_wolf() -> None:
    raw = []
    for seed in range(SEEDS):
        measured = churned(seed, 200, drop=0)
        old, new = (sum(row[0] for row in measured.arms[arm]) for arm in ("base", "adapter"))
        raw.append((new - old) / 200 < -0.01)
    assert sum(raw) > 0.2 * SEEDS


def test_more_forgetting_than_allowed_is_caught() -> None:
    gates = Gates(max_forgetting=0.02)
    caught = [
        alarm(gates, churned(0, 50, 0), seed=seed, retained=[losses(seed, 200, worse=0.08)])
        for seed in range(50)
    ]
    assert sum(caught) >= 48


def test_none_of_twenty_is_inconclusive() -> None:
    ground = Ground({"exact_match": binary([(False, False)] * 20)}, (), "adapter")
    gates = judge(Gates(fail_under={"exact_match": 0.1}, min_gain=0), ground)
    assert [gate.outcome for gate in gates] == ["inconclusive", "inconclusive"]
    assert "is 0.0 % (0.0 to 16.1): 20 rows cannot tell" in gates[0].reason


def test_all_of_twenty_and_none_before_is_proof() -> None:
    ground = Ground({"exact_match": binary([(False, True)] * 20)}, (), "adapter")
    gates = judge(Gates(fail_under={"exact_match": 0.8}, min_gain=0), ground)
    assert [gate.outcome for gate in gates] == ["passed", "passed"]


def test_no_change_in_five_rows_does_not_prove_a_margin() -> None:
    for rows, outcome in ((5, "inconclusive"), (200, "passed")):
        ground = Ground({"exact_match": binary([(True, True)] * rows)}, (), "adapter")
        (gate,) = judge(Gates(min_gain=-0.03), ground)
        assert gate.outcome == outcome


def test_merge_drift_is_two_sided() -> None:
    for factor, outcome in ((1.0, "passed"), (1.05, "regression"), (0.95, "regression")):
        measured = losses(0, 100, worse=0)
        arms = dict(measured.arms)
        arms["merged"] = [(nats * factor, tokens) for nats, tokens in arms["adapter"]]
        measured = Measured(LOSS, measured.keys, arms)
        ground = Ground({"loss": measured}, (), "adapter")
        (gate,) = judge(Gates(max_merge_drift=0.01), ground)
        assert gate.outcome == outcome


def test_a_drop_against_an_earlier_report() -> None:
    measured = churned(3, 500, drop=0.15)
    earlier = Measured(
        measured.metric,
        measured.keys,
        {"earlier": measured.arms["base"], "now": measured.arms["adapter"]},
    )
    (gate,) = judge(Gates(), Ground({"exact_match": measured}, (), "adapter", earlier))
    assert gate.outcome == "regression"
    assert "the earlier report" in gate.reason


def report(*outcomes: str, require_proof: bool = False) -> Evaluation:
    gates = tuple(Gate("min_gain", outcome, outcome, 0.5, 0.5) for outcome in outcomes)  # type: ignore[arg-type]
    rows = Rows("rows.jsonl", 1, 1, 1, 0, 0)
    return Evaluation(
        source="run", kind="run", arms=(), rows=rows, primary="loss", why_metrics="", scores=(),
        differences=(), forgetting=(), latency=(), gates=gates, examples=(), settings={},
        notes=(), table={}, require_proof=require_proof,
    )  # fmt: skip


def test_exit_codes() -> None:
    enforce(report("passed", "inconclusive"))
    with pytest.raises(RegressionFound) as broken:
        enforce(report("passed", "regression", require_proof=True))
    assert broken.value.exit_code == ExitCode.REGRESSION == 10
    with pytest.raises(Inconclusive) as unclear:
        enforce(report("passed", "inconclusive", require_proof=True))
    assert unclear.value.exit_code == ExitCode.INCONCLUSIVE == 11


def test_limits_as_they_are_written() -> None:
    assert read_limits(["exact_match=80%", "chrf=45"]) == {"exact_match": 0.8, "chrf": 45.0}
    assert read_share("2%", "--max-forgetting") == 0.02
    with pytest.raises(Exception, match="between 0 and 1"):
        read_limits(["exact_match=80"])
    with pytest.raises(Exception, match="did you mean exact_match"):
        read_limits(["exact_mtch=0.8"])
    with pytest.raises(Exception, match="no number"):
        read_share("two", "--max-forgetting")
