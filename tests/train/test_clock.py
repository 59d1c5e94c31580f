"""When a step ended, as the host's clock and the GPU's two events tell it."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
import torch

from peftcli.train.clock import Mark, StepClock, mark


class Event:
    """A CUDA event that came at a time of the GPU's own clock, in milliseconds."""

    def __init__(self, at: float) -> None:
        self.at = at

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def point(handed: float, at: float) -> Mark:
    return Mark(handed, cast(Any, Event(at)))


def clock_at(last: float) -> StepClock:
    """A clock whose last step ended then, at 0 ms of the GPU's clock."""
    clock = StepClock()
    clock._last, clock._ended = point(last, 0.0), last
    return clock


def test_a_step_that_is_logged_at_once_ended_now() -> None:
    clock = StepClock()
    clock.begin(torch.device("cpu"))
    before = time.perf_counter()
    assert before <= clock.take() <= time.perf_counter()


def test_a_step_on_a_cpu_ended_when_the_host_came_there() -> None:
    clock = StepClock()
    begun = clock.begin(torch.device("cpu"))
    point = mark(torch.device("cpu"))
    time.sleep(0.01)
    clock.came(point)
    assert begun <= clock.take() == point.handed
    assert clock.take() > point.handed + 0.01  # told once


@pytest.mark.parametrize(
    ("handed", "after_ms", "ended"),
    [
        (-90.0, 60_000, -40.0),  # as long after the step before as the GPU says
        (-90.0, 5_000, -90.0),  # never before it was handed over
        (-90.0, 900_000, 0.0),  # nor after its figures were there
    ],
)
def test_a_step_on_a_gpu_ended_as_long_after_the_one_before_as_the_gpu_took(
    handed: float, after_ms: float, ended: float
) -> None:
    now = time.perf_counter()
    clock = clock_at(now - 100)
    clock.came(point(now + handed, after_ms))
    assert clock.take() == pytest.approx(now + ended, abs=0.5)


def test_the_next_step_goes_on_from_there() -> None:
    now = time.perf_counter()
    clock = clock_at(now - 100)
    clock.came(point(now - 99, 30_000))
    clock.came(point(now - 98, 50_000))
    assert clock.take() == pytest.approx(now - 50)


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    device, clock = torch.device("cuda"), StepClock()
    torch.cuda.synchronize()
    begun = clock.begin(device)
    x = torch.ones(4096, 4096, device=device)
    for _ in range(50):
        x = x @ x
    points, ended = [mark(device)], list[float]()
    time.sleep(0.5)  # the GPU is idle before the next point
    points.append(mark(device))
    torch.cuda.synchronize()
    for point in points:
        clock.came(point)
        ended.append(clock.take())
    assert begun <= ended[0] <= ended[1] <= time.perf_counter()
    assert all(point.handed <= end for point, end in zip(points, ended, strict=True))
