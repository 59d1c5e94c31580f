"""Early stopping that a resumed run counts on from where it stood."""

from __future__ import annotations

from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Stops after some evaluations without a better loss, those before a resume included."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        counted = saved["attributes"]["early_stopping_patience_counter"]
        self.early_stopping_patience_counter = counted
        if counted >= self.early_stopping_patience:
            control.should_training_stop = True
