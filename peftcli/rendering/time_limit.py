"""A limit on the time that templates and tokenizers take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from peftcli.errors import ArtefactError
from peftcli.rendering.budget import TooMuch

CPU_SECONDS = 60.0
PROBE_SECONDS = 10.0  # a few short conversations, which take milliseconds


@contextmanager
def time_limit(seconds: float | None = None) -> Iterator[None]:
    """Stop templates that run for CPU_SECONDS, which is ample for thousands of rows.

    Signals reach the main thread only, so in other threads only the text and the loops are bounded.
    """
    limit = CPU_SECONDS if seconds is None else min(seconds, CPU_SECONDS)

    def too_slow(signum: int, frame: FrameType | None) -> None:
        raise TooMuch(f"it ran for more than {limit:g} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit, 1.0)  # again, in case something swallowed it
    try:
        yield
    except TooMuch as error:  # outside of a template, where its rows are tokenised
        raise ArtefactError(
            f"the rows were not prepared: {error}",
            "do not use a template or a tokenizer that you do not trust",
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
