"""A lab, a recipe on the bundled model, and the result of a run that nothing happened to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.lab import Lab, opened
from faults.scene import Scene, make_scene


@pytest.fixture(scope="session")
def workplace() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs cost nothing there."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="peftcli-faults-", dir=parent))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def lab(workplace: Path) -> Iterator[Lab]:
    """A lab; faults at an exact operation need `exact`."""
    with opened(workplace) as lab:
        yield lab


@pytest.fixture
def exact(lab: Lab) -> Lab:
    """The lab, when it can count I/O operations."""
    if not lab.counts:
        pytest.skip("no C compiler here to build the library that counts I/O operations")
    return lab


@pytest.fixture(scope="session")
def scene(lab: Lab, workplace: Path) -> Scene:
    """A recipe, and what an uninterrupted run of it gives."""
    return make_scene(lab, workplace)
