"""The N-th I/O operation of a run fails, kills or is cut short, for N = 1, 2, 3 and so on.

The way SQLite is tested. Here a sample of all N, another one each day; `scripts/soak operations`
goes through every one.
"""

from __future__ import annotations

import errno
import random
import time

import pytest
from faults.lab import Fault, Lab
from faults.operations import check_operation
from faults.scene import Scene

PLACES = 4  # of each kind; the whole of it is some 500
ACTIONS = [
    ("fail", errno.EIO),
    ("fail on", errno.ENOSPC),
    ("fail on", errno.EROFS),
    ("kill", 0),
    ("tear", 0),
]


def places(scene: Scene, salt: str) -> list[int]:
    """One operation from each part of the run."""
    chance = random.Random(f"{time.strftime('%Y-%j')} {salt}")
    width = scene.operations / PLACES
    return [int(width * (i + chance.random())) + 1 for i in range(PLACES)]


@pytest.mark.parametrize(("action", "error"), ACTIONS)
def test_the_nth_operation(exact: Lab, scene: Scene, action: str, error: int) -> None:
    for number in places(scene, f"{action} {error}"):
        check_operation(exact, scene, Fault(action, number, error))
