"""Published peaks beside ours: what README shows is fresh, close where it can be, and explained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from estimate_points import Point, points

ROOT = Path(__file__).parents[2]
POINTS = points()


def test_there_are_enough_and_all_are_different() -> None:
    assert len(POINTS) >= 30
    assert len({(point.what, point.source) for point in POINTS}) == len(POINTS)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.source}: {point.what}")
def test_what_is_far_away_says_why(point: Point) -> None:
    if abs(point.error) > 0.1:
        assert point.why
    if point.kind == "allocated":  # the same quantity, on known software
        assert abs(point.error) < (0.07 if "2x2048" in point.what else 0.03)


def test_readme_shows_these_figures() -> None:
    script = ROOT / "scripts" / "compare_estimates"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
