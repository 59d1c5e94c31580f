"""A signal at the worst moment: while an event is being written."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

from transformers import TrainerControl, TrainerState
from trl import SFTConfig

from peftcli.events import Event, Note
from peftcli.train.interruption import Interruption


class Interrupted(io.RawIOBase):
    """A file whose first write is interrupted by SIGTERM."""

    def __init__(self) -> None:
        self.written = b""
        self._interrupted = False

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(memoryview(data))  # type: ignore[arg-type]
        if not self._interrupted:
            self._interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)
        self.written += part
        return len(part)


def test_a_signal_during_an_event_is_announced_after_the_step(tmp_path: Path) -> None:
    raw = Interrupted()
    stream = io.BufferedWriter(raw)

    def tell(event: Event) -> None:
        assert isinstance(event, Note)
        stream.write(event.text.encode())
        stream.flush()

    control = TrainerControl()
    arguments = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with Interruption(tell) as interruption:
        interruption.on_train_begin(arguments, TrainerState(), control)
        tell(Note("step 1."))
        assert interruption.received == "SIGTERM"
        assert raw.written == b"step 1."
        interruption.on_step_end(arguments, TrainerState(), control)
    assert raw.written.startswith(b"step 1.SIGTERM: finishing this step")
    assert control.should_save
    assert control.should_training_stop
