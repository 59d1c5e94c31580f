"""kill -9 at random moments; `scripts/soak kills` goes on for as long as asked."""

from __future__ import annotations

import random
import time

from faults.kills import kill_and_resume
from faults.lab import Lab
from faults.scene import Scene

KILLS = 8
BUDGET = 60.0  # seconds


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    lab: Lab, scene: Scene
) -> None:
    seed = time.strftime("%Y-%j")
    chance, kills, began = random.Random(seed), 0, time.monotonic()
    while kills < KILLS:
        kills += len(kill_and_resume(lab, scene, chance))
        if time.monotonic() - began > BUDGET:
            break
    assert kills >= 4
