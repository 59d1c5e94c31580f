"""Everything that was measured -> the report's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.evaluate.against import read_report, table_of, with_earlier
from peftcli.evaluate.compare import Measured, difference_of, score_of
from peftcli.evaluate.examples import answered, examples_of
from peftcli.evaluate.forget import Retained, forgetting_of, retained
from peftcli.evaluate.gates import Ground, judge
from peftcli.evaluate.harness import TaskResult, task_scores
from peftcli.evaluate.options import EvalOptions
from peftcli.evaluate.result import Difference, Evaluation, Forgetting, Score
from peftcli.evaluate.rows import Asked
from peftcli.evaluate.scoring import Scoring, chosen, measured_scores
from peftcli.evaluate.session import Collected
from peftcli.evaluate.target import Target
from peftcli.metrics import Metric, mean
from peftcli.recipe.load import recipe_text
from peftcli.records import metrics_line
from peftcli.run_dir import RunDir

ENDED = Metric("ended", lambda prediction, reference: (), mean)
"""Answers that the model ended itself, before the limit of new tokens."""

SELDOM = 0.8


@dataclass(frozen=True)
class Summary:
    """What is needed to sum up."""

    target: Target
    options: EvalOptions
    asked: Asked
    scoring: Scoring
    found: Collected
    settings: Mapping[str, Any]

    def evaluation(self, seconds: float) -> Evaluation:
        """The report."""
        said = self._said()
        measured = measured_scores(
            self.scoring, self.asked, self.found.losses, said, self.found.likelihoods
        )
        if self.found.written:
            measured = {**measured, ENDED.name: self._ended()}
        kept = [
            retained(source, losses, self.found.continued[source])
            for source, losses in self.found.kept.items()
        ]
        tasks = task_scores(self.found.tasks) if self.found.tasks else []
        scores, differences = self._compared([*measured.values(), *tasks])
        ground, against = self._ground(measured, kept)
        losses, eval_losses = curves(self.target)
        loaded = self.target.loaded
        return Evaluation(
            source=self.target.source,
            kind=self.target.kind,
            arms=tuple(self.found.arms),
            rows=self.asked.rows,
            primary=next(iter(measured)),
            why_metrics=self.scoring.why,
            scores=(*scores, *self._reported(tasks)),
            differences=(*differences, *against),
            forgetting=self._forgetting(kept),
            latency=tuple(self.found.latency),
            gates=judge(self.options.gates, ground),
            examples=examples_of(self.asked, measured, said, self.target.tuned_arm),
            settings=dict(self.settings),
            notes=(*self.asked.notes, *self._remarks(measured)),
            table=table_of(list(measured.values())),
            recipe=recipe_text(loaded.recipe) if loaded is not None else "",
            losses=losses,
            eval_losses=eval_losses,
            against=str(self.options.against or ""),
            require_proof=self.options.gates.require_proof,
            seconds=seconds,
        )

    def _said(self) -> dict[str, dict[str, str]]:
        """What every arm answers: written text, or the label it prefers."""
        if self.found.written:
            return {arm: answered(of, self.asked) for arm, of in self.found.written.items()}
        return {
            arm: {
                item.key: chosen(of[item.key], item, self.asked, self.scoring, False)[0]
                for item in self.asked.questions
            }
            for arm, of in self.found.likelihoods.items()
        }

    def _ended(self) -> Measured:
        keys = tuple(item.key for item in self.asked.questions)
        rows = {
            arm: [(float(of[key][1]), 1.0) for key in keys]
            for arm, of in self.found.written.items()
        }
        return Measured(ENDED, keys, rows)

    def _remarks(self, measured: Mapping[str, Measured]) -> list[str]:
        """What looks wrong with the answers."""
        if ENDED.name not in measured:
            return []
        tuned = self.target.tuned_arm
        rows = measured[ENDED.name].arms[tuned]
        share = sum(row[0] for row in rows) / len(rows)
        if share >= SELDOM:
            return []
        return [
            f"{tuned} ended {share:.0%} of its answers itself, the rest at the limit of new "
            "tokens; either the limit is short, or it never learned the token that ends a turn"
        ]

    def _compared(self, every: Sequence[Measured]) -> tuple[list[Score], list[Difference]]:
        seed, resamples = self.options.seed, self.options.resamples
        scores = [score_of(one, arm, seed, resamples) for one in every for arm in one.arms]
        differences = [
            difference_of(one, *pair, seed, resamples)
            for one in every
            for pair in (("base", "adapter"), ("base", "tuned"), ("adapter", "merged"))
            if set(pair) <= set(one.arms)
        ]
        return scores, differences

    def _forgetting(self, kept: Sequence[Retained]) -> tuple[Forgetting, ...]:
        tuned = self.target.tuned_arm
        seed, resamples = self.options.seed, self.options.resamples
        return tuple(forgetting_of(one, tuned, seed, resamples) for one in kept)

    def _ground(
        self, measured: Mapping[str, Measured], kept: Sequence[Retained]
    ) -> tuple[Ground, list[Difference]]:
        """What gates look at, and the difference to an earlier report."""
        seed, resamples = self.options.seed, self.options.resamples
        tuned, earlier, differences = self.target.tuned_arm, None, []
        if self.options.against is not None:
            report = read_report(self.options.against)
            earlier = with_earlier(next(iter(measured.values())), tuned, report)
            differences = [difference_of(earlier, "earlier", "now", seed, resamples)]
        losses = [one.losses for one in kept]
        return Ground(measured, losses, tuned, earlier, seed, resamples), differences

    def _reported(self, compared: Sequence[Measured]) -> list[Score]:
        """Values of the harness that are no mean over documents, as it reports them."""
        known = {one.metric.name for one in compared}
        return [
            _as_reported(arm, one)
            for arm, results in self.found.tasks.items()
            for one in results
            if one.name not in known
        ]


def curves(target: Target) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]]:
    """Training and held-out losses by step, of a run."""
    if target.manifest is None or target.loaded is None:
        return (), ()
    folder = Path(target.source)
    folder = folder if folder.is_dir() else Path(target.loaded.recipe.output)
    metrics = RunDir(folder if folder.name != "adapter" else folder.parent).metrics
    if not metrics.is_file():
        return (), ()
    text = metrics.read_text(encoding="utf-8", errors="replace")
    lines = [x for x in map(metrics_line, text.splitlines(keepends=True)) if x is not None]
    losses = tuple((x["step"], x["loss"]) for x in lines if x.get("loss") is not None)
    return losses, tuple((x["step"], x["eval_loss"]) for x in lines if x.get("eval_loss"))


def _as_reported(arm: str, result: TaskResult) -> Score:
    value = result.value
    return Score(result.name, arm, len(result.documents), value, value, value, "reported")
