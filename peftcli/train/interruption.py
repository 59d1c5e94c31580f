"""SIGINT and SIGTERM during a run."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.events import Listener, Note


class Interruption(TrainerCallback):  # type: ignore[misc]
    """SIGINT and SIGTERM: finish the step, save, stop; a second one ends the process at once.

    Outside the steps, where there is nothing to save, the first one raises KeyboardInterrupt.
    """

    def __init__(self, tell: Listener) -> None:
        self.tell = tell
        self.received: str | None = None
        self._stepping = self._unannounced = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(75)  # the newest complete checkpoint is safe: it was renamed into place
        self.received = signal.Signals(number).name
        if not self._stepping:
            raise KeyboardInterrupt
        try:
            self._announce()
        except RuntimeError:  # it came while an event was being written, which is not reentrant
            self._unannounced = True

    def _announce(self) -> None:
        self._unannounced = False
        self.tell(Note(f"{self.received}: finishing this step and saving; once more to stop now"))

    def check(self) -> None:
        """Leave an evaluation that nobody will read; raises KeyboardInterrupt."""
        if self.received is not None:
            raise KeyboardInterrupt

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self._stepping = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if self._unannounced:
            self._announce()
        if self.received is not None:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
