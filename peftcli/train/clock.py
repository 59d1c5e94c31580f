"""When the steps of a run ended, on the host's clock, without waiting for the GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mark:
    """A point in the work of a device."""

    handed: float
    """When the host came to it, in seconds; the device was there then or came later."""
    event: torch.cuda.Event | None
    """Comes when a GPU is there; a CPU is there at once."""


def mark(device: torch.device) -> Mark:
    """The point up to which the device was given work."""
    handed, event = time.perf_counter(), None
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
    return Mark(handed, event)


def seconds_between(one: Mark, other: Mark) -> float:
    """The device's seconds from one point to a later one; it must be past both."""
    if one.event is None or other.event is None:
        return other.handed - one.handed
    return float(one.event.elapsed_time(other.event)) / 1000


class StepClock:
    """Tells the monitor when the step had ended whose figures the trainer logs.

    On a GPU a step's figures are read a step late. When it ended is found from the end of the step
    before and the GPU's own time between the two, and lies after the host handed it over and before
    its figures were there; so the two clocks cannot drift apart.
    """

    def __init__(self) -> None:
        self._last: Mark | None = None
        self._ended = 0.0
        self._untold = False

    def begin(self, device: torch.device) -> float:
        """Start at a device that is done with what came before; the time, in seconds."""
        self._last = mark(device)
        self._ended = self._last.handed
        return self._ended

    def came(self, point: Mark) -> None:
        """Take down when a step ended; the device must be past it."""
        now, before = time.perf_counter(), self._last
        if point.event is None:
            self._ended = point.handed
        elif before is None or before.event is None:
            self._ended = now
        else:
            ended = self._ended + seconds_between(before, point)
            self._ended = max(point.handed, min(now, ended))
        self._last, self._untold = point, True

    def take(self) -> float:
        """When the step ended that is logged now: what was taken down last, or this moment."""
        if not self._untold:
            return time.perf_counter()
        self._untold = False
        return self._ended
