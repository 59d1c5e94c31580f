"""The order of the work: group by group of arms that share weights, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from peftcli.evaluate.arms import Group, fits_beside, switched
from peftcli.evaluate.forget import halves
from peftcli.evaluate.generate import Decoding
from peftcli.evaluate.harness import TaskResult, run_tasks
from peftcli.evaluate.latency import measure_latency
from peftcli.evaluate.measure import Lazy, Measuring, Results
from peftcli.evaluate.options import EvalOptions
from peftcli.evaluate.questions import Item
from peftcli.evaluate.result import Arm, Latency
from peftcli.evaluate.rows import Asked
from peftcli.evaluate.scoring import Scoring, candidates
from peftcli.events import Note

CONTINUED = 32
"""New tokens after the first half of a retained text."""
TASK_BATCH = 8


@dataclass
class Collected:
    """Results as they come, by arm and row key; those of retained text by source first."""

    arms: list[Arm] = field(default_factory=list)
    losses: dict[str, Results] = field(default_factory=dict)
    likelihoods: dict[str, Results] = field(default_factory=dict)
    written: dict[str, Results] = field(default_factory=dict)
    kept: dict[str, dict[str, Results]] = field(default_factory=dict)
    continued: dict[str, dict[str, Results]] = field(default_factory=dict)
    tasks: dict[str, list[TaskResult]] = field(default_factory=dict)
    latency: list[Latency] = field(default_factory=list)


@dataclass(frozen=True)
class Session:
    """Everything that an evaluation measures with."""

    asked: Asked
    scoring: Scoring
    retained: Mapping[str, Sequence[Item]]
    """Source of retained text -> its documents."""
    decoding: Decoding
    measuring: Measuring
    options: EvalOptions
    tokenizer: PreTrainedTokenizerBase

    def collect(self, groups: Sequence[Group]) -> Collected:
        """Measure every arm; weights stay in memory only while others still fit beside them."""
        found = Collected()
        device = self.measuring.device
        held: list[Lazy] = []
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            lazy = Lazy(group, device)
            held.append(lazy)
            for arm in group.arms:
                self._measure(lazy, arm, found)
                self._tasks(lazy, arm, found)
            if self.options.latency:
                lazy.get()
            if following is None or not self.options.latency or not fits_beside(following, device):
                self._latency(held, found)
                found.arms += [_weighed(one, arm) for one in held for arm in one.group.arms]
                for one in held:
                    one.release()
                held = []
        return found

    def _measure(self, lazy: Lazy, arm: Arm, found: Collected) -> None:
        measuring, asked = self.measuring, self.asked
        found.losses[arm.name] = measuring.losses(lazy, arm, asked.items, "loss")
        if self.scoring.chooses:
            some = candidates(asked, self.scoring)
            found.likelihoods[arm.name] = measuring.choices(
                lazy, arm, asked.questions, some, "label likelihoods"
            )
        if self.scoring.writes:
            found.written[arm.name] = measuring.answers(
                lazy, arm, asked.questions, self.decoding, "answers"
            )
        if arm.name in ("merged", "model"):
            return
        for source, items in self.retained.items():
            kept = measuring.losses(lazy, arm, items, f"loss on {source}")
            found.kept.setdefault(source, {})[arm.name] = kept
            short = replace(self.decoding, max_new_tokens=CONTINUED)
            more = measuring.answers(lazy, arm, halves(items), short, f"answers on {source}")
            found.continued.setdefault(source, {})[arm.name] = more

    def _tasks(self, lazy: Lazy, arm: Arm, found: Collected) -> None:
        if not self.options.tasks:
            return
        self.measuring.tell(Note(f"{arm.name}: {', '.join(self.options.tasks)} by lm-eval"))
        with switched(lazy.get().model, arm.name) as model:
            found.tasks[arm.name] = run_tasks(
                model,
                self.tokenizer,
                self.options.tasks,
                self.decoding.stops,
                limit=self.options.task_limit,
                seed=self.options.seed,
                batch_size=TASK_BATCH,
            )

    def _latency(self, held: Sequence[Lazy], found: Collected) -> None:
        if not self.options.latency:
            return
        self.measuring.tell(Note("measuring time to first token and tokens/s"))
        arms = [(arm.name, lazy.get()) for lazy in held for arm in lazy.group.arms]
        items = self.asked.questions or self.asked.items
        found.latency += measure_latency(arms, items, self.asked.positions, self.measuring.device)


def _weighed(lazy: Lazy, arm: Arm) -> Arm:
    loaded = lazy.loaded
    return arm if loaded is None else replace(arm, weights_gib=loaded.weights_gib(arm.name))
