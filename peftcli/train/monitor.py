"""Watches a run: lines for metrics.jsonl, events for the terminal, numbers that went wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.events import Evaluated, Listener, Saved, Step, Warned
from peftcli.train.clock import StepClock
from peftcli.train.health import Health
from peftcli.train.memory import peak_memory_gib
from peftcli.train.metrics_file import MetricsFile


class Monitor(TrainerCallback):  # type: ignore[misc]
    """Turns what the trainer logs into events and lines of metrics.jsonl."""

    def __init__(
        self, metrics: Path, tell: Listener, tokens_read: Callable[[int], float], health: Health
    ) -> None:
        self.file = MetricsFile(metrics)
        self.tell = tell
        self.tokens_read = tokens_read
        self.health = health
        self.clock = StepClock()
        self.best_loss: float | None = None
        self.losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self._started = 0.0
        self._since: float | None = None
        """Since when time counts as spent on steps; None during evaluations and checkpoints."""
        self._in_steps = 0.0
        self._first_step = 0
        self._seconds_before = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        for line in self.file.open(state.global_step):
            self._remember(line)
        self.health.told()  # they were told before
        self._started = self.clock.begin(args.device)
        self._first_step = state.global_step

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        ended = self.clock.take()
        seconds = ended - self._started
        if self._since is not None:
            self._in_steps, self._since = self._in_steps + ended - self._since, ended
        done = max(1, state.global_step - self._first_step)
        step = Step(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            loss=logs["loss"],
            learning_rate=logs.get("learning_rate", 0.0),
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=self.tokens_per_second(state.global_step),
            memory_gib=peak_memory_gib(),
            remaining_seconds=seconds / done * (state.max_steps - state.global_step),
        )
        self._watch(control)
        self.losses.append((step.step, step.loss))
        line = {
            "step": step.step,
            "epoch": step.epoch,
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "tokens_per_second": round(step.tokens_per_second, 1),
            "memory_gib": round(step.memory_gib, 3),
            "seconds": round(self._seconds_before + seconds, 3),
        }
        self.file.write(line, sync=control.should_save)
        self.tell(step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._since = None
        if not metrics or "eval_loss" not in metrics:
            return
        loss = metrics["eval_loss"]
        best = self.best_loss is None or loss < self.best_loss
        if best:
            self.best_loss = loss
        self.eval_losses.append((state.global_step, loss))
        line = {"step": state.global_step, "eval_loss": loss}
        self.file.write(line, sync=control.should_save)
        self.tell(Evaluated(state.global_step, loss, math.exp(min(loss, 700.0)), best))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self._since = None
        self.tell(
            Saved(state.global_step, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if self.health.failure:
            self._stop(control)
        elif state.global_step >= state.max_steps:  # the last step is always looked at and kept
            control.should_evaluate = args.do_eval
            control.should_save = True

    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included up to where it goes on."""
        return self._seconds_before + time.perf_counter() - self._started

    def tokens_per_second(self, step: int) -> float:
        """Mean rate of this process up to `step`, without evaluations and checkpoints."""
        read = self.tokens_read(step) - self.tokens_read(self._first_step)
        return read / (self._in_steps or 1.0)

    def close(self) -> None:
        """Finish metrics.jsonl."""
        self.file.close()

    def _watch(self, control: TrainerControl) -> None:
        for text in self.health.told():
            self.tell(Warned(text))
        if self.health.failure:
            self._stop(control)

    def _stop(self, control: TrainerControl) -> None:
        control.should_training_stop = True
        control.should_save = False
        control.should_evaluate = False

    def _remember(self, line: dict[str, Any]) -> None:
        """A line of the part of the run that was before a resume."""
        step, seconds = line["step"], line.get("seconds")
        if "eval_loss" in line:
            loss = _number(line["eval_loss"])
            self.eval_losses.append((step, loss))
            if self.best_loss is None or loss < self.best_loss:
                self.best_loss = loss
            return
        loss, norm = _number(line["loss"]), _number(line.get("grad_norm"))
        self.losses.append((step, loss))
        self.health.admits(step, loss, norm)
        self._seconds_before = seconds or self._seconds_before


def _number(value: float | None) -> float:
    return math.nan if value is None else value
