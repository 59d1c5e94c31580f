"""What happens between a loaded checkpoint and the first step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.events import Listener, Note
from peftcli.train import checkpoints
from peftcli.train.memory import peak_memory_gib
from peftcli.train.probe import probe_memory
from peftcli.train.trainer import RecipeTrainer


class Starting(TrainerCallback):  # type: ignore[misc]
    """Probes the memory, makes up for an evaluation that a signal cut short, finds the best.

    Knows also whether parameters and optimizer belong to one and the same step.
    """

    def __init__(self, checkpoint: Path | None, tell: Listener, *, probe: bool) -> None:
        self.checkpoint = checkpoint
        self.tell = tell
        self.probe = probe
        self.trainer: RecipeTrainer | None = None
        self.whole = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        # Never the recorded path: the folder may have been moved since, or the path be planted.
        state.best_model_checkpoint = str(best) if state.best_global_step else None
        if self.trainer is None:
            return
        self.trainer.model.train()  # a base loads for evaluation: no checkpointing, no NEFTune
        if self.probe and state.global_step < state.max_steps:
            probe_memory(self.trainer)
            self.tell(Note(f"the longest batch fits: peak {peak_memory_gib():.2f} GiB"))
        if self.checkpoint is not None and (self.checkpoint / checkpoints.UNEVALUATED).exists():
            self._evaluate_late(self.trainer, self.checkpoint, control)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self.whole = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self.whole = True

    def _evaluate_late(
        self, trainer: RecipeTrainer, checkpoint: Path, control: TrainerControl
    ) -> None:
        """The evaluation of the checkpoint's own step, which then saves it once more."""
        trainer._load_rng_state(str(checkpoint))
        control.should_log, control.should_evaluate, control.should_save = False, True, True
        trainer._maybe_log_save_evaluate(
            tr_loss=torch.zeros(()),
            grad_norm=None,
            model=trainer.model,
            trial=None,
            epoch=trainer.state.epoch or 0.0,
            ignore_keys_for_eval=None,
            start_time=time.time(),
        )
