"""SIGINT and SIGTERM during a run."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.events import Listener, Note
from peftcli.train import rng

SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar hides it


class Interruption(TrainerCallback):  # type: ignore[misc]
    """A signal to stop: finish the step, save, stop; a second one ends the process at once.

    Outside the steps, where there is nothing to save, the first one raises KeyboardInterrupt.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, tell: Listener) -> None:
        self.tell = tell
        self.received: str | None = None
        self.before_evaluation: rng.RandomState | None = None
        """Random numbers as they were before the last evaluation began."""
        self._stepping = self._unannounced = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in self.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if sys.stderr.isatty():
                os.write(2, SHOW_CURSOR)
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
        # An evaluation that is due raises at its first batch, and a resume makes up for it.
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if control.should_evaluate:
            self.before_evaluation = rng.capture()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self._stepping = False
