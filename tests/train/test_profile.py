"""The script that shows where a step's time goes: what it reads from a profiler's events."""

from __future__ import annotations

import random
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

SCRIPT = Path(__file__).parents[2] / "scripts" / "profile_train"


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("profile_train", str(SCRIPT))
    spec = spec_from_loader("profile_train", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["profile_train"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def test_gaps_lie_behind_everything_that_has_started(script: Any) -> None:
    device = [
        ("long", 10.0, 50.0),
        ("first", 0.0, 10.0),  # not in order; `long` follows at once
        ("within", 20.0, 30.0),  # on another stream; `long` still runs after it
        ("next", 57.0, 60.0),
        ("last", 61.0, 62.0),
    ]
    assert script.find_gaps(device) == [
        script.Gap(50.0, 57.0, "long", "next"),
        script.Gap(60.0, 61.0, "next", "last"),
    ]
    assert script.find_gaps(device[:1]) == script.find_gaps([]) == []


def test_gaps_and_busy_time_fill_the_window(script: Any) -> None:
    draw = random.Random(3)
    starts = [draw.randrange(2000) for _ in range(120)]
    device = [(f"k{start}", start, start + draw.randrange(1, 12)) for start in starts]
    busy = {us for _, start, end in device for us in range(start, end)}
    gaps = script.find_gaps(device)
    idle = {us for gap in gaps for us in range(gap.start, gap.end)}
    assert idle == set(range(min(busy), max(busy) + 1)) - busy
    assert all((gap.start - 1 in busy) and (gap.end in busy) for gap in gaps)


def test_sizes_are_per_step_and_a_limit_belongs_to_the_class_above(script: Any) -> None:
    device, now = [], 0.0
    for wait in (0, 1, 2, 9, 10, 100, 400, 1.5):
        device.append((f"after {wait}", now + wait, now + wait + 5))
        now += wait + 5
    found = script.describe_gaps(device, [], steps=2, largest=2)
    sizes = {size: (each["count"], each["ms"]) for size, each in found["sizes"].items()}
    assert sizes == {
        "below 2 us": (1.0, pytest.approx(0.00125)),
        "2 to 10 us": (1.0, pytest.approx(0.0055)),
        "10 to 100 us": (0.5, pytest.approx(0.005)),
        "above 100 us": (1.0, pytest.approx(0.25)),
    }
    assert [gap["after"] for gap in found["largest"]] == ["after 400", "after 100"]
    assert found["largest"][0]["innermost"] == {script.NOTHING: pytest.approx(0.4)}


def test_the_host_in_a_gap(script: Any) -> None:
    device = [("a", 0.0, 10.0), ("b", 110.0, 120.0), ("c", 120.0, 130.0)]
    host = [
        ("main", -50.0, 500.0),  # around everything: says nothing
        ("Optimizer.step", 5.0, 90.0),
        ("aten::item", 15.0, 80.0),
        ("cudaStreamSynchronize", 20.0, 75.0),
        ("cudaLaunchKernel", 105.0, 112.0),
        ("after the gap", 110.0, 115.0),
    ]
    (gap,) = script.describe_gaps(device, host, steps=1, largest=5)["largest"]
    assert (gap["before"], gap["after"], gap["ms"]) == ("a", "b", 0.1)
    assert gap["innermost"] == {
        "cudaStreamSynchronize": pytest.approx(0.055),
        script.NOTHING: pytest.approx(0.015),
        "Optimizer.step": pytest.approx(0.015),
    }
    assert gap["outermost"] == {
        "Optimizer.step": pytest.approx(0.08),
        script.NOTHING: pytest.approx(0.015),
        "cudaLaunchKernel": pytest.approx(0.005),
    }


@pytest.mark.parametrize("python", [False, True])
def test_the_host_of_a_real_profile(
    script: Any, python: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = torch.rand(40, 40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(matrix)], lr=0.1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, acc_events=True, with_stack=python
    ) as profiler:
        optimizer.step(lambda: matrix.mm(matrix).sum().item())
    device, host = script.sides_of(profiler.events())
    assert not device
    spans = {name: (start, end) for name, start, end in host}
    start, end = spans["Optimizer.step#SGD.step"]
    inner = script.leading(host, start, end, innermost=True, most=1000)
    assert sum(inner.values()) == pytest.approx((end - start) / 1e3)
    assert {"aten::mm", "aten::sum", "Optimizer.step#SGD.step"} < inner.keys()
    leaf = "aten::_local_scalar_dense"  # nothing runs within it
    assert inner[leaf] == pytest.approx((spans[leaf][1] - spans[leaf][0]) / 1e3)
    assert any(".py(" in name or "<built-in" in name for name in inner) == python

    # The gap is the item, and kernels before and after let nothing lie around them all.
    start, end = spans["aten::item"]
    device = [("before", -1e9, start), ("after", end, 1e9)]
    found = script.describe_gaps(device, host, steps=1, largest=1)
    (gap,) = found["largest"]
    assert set(gap["innermost"]) == {"aten::item", leaf}
    (outer,) = gap["outermost"]
    assert (outer == "Optimizer.step#SGD.step") != python  # else a function is around the step
    script.print_gaps(found)
    assert f"after      before\n{'':15}before     after\n" in capsys.readouterr().out


def test_a_range_of_the_host_is_no_work_of_the_device(script: Any) -> None:
    def event(name: str, device: DeviceType, **rest: Any) -> FunctionEvent:
        return FunctionEvent(
            id=1, name=name, thread=1, start_us=1.0, end_us=4.0, device_type=device, **rest
        )

    device, host = script.sides_of(
        [
            event("kernel", DeviceType.CUDA),
            event("Optimizer.step", DeviceType.CUDA, is_user_annotation=True),
            event("Optimizer.step", DeviceType.CPU, is_user_annotation=True),
            event("cudaLaunchKernel", DeviceType.CPU),
        ]
    )
    assert device == [("kernel", 1.0, 4.0)]
    assert host == [("Optimizer.step", 1.0, 4.0), ("cudaLaunchKernel", 1.0, 4.0)]
