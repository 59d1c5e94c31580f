"""A few hundred cases for each target, and the cases that once found something."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from fuzz.cases import CASES
from fuzz.targets import TARGETS, check_target
from hypothesis import HealthCheck, given, settings

SEEDS = sorted((Path(__file__).parent / "seeds").iterdir())


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_seeds(seed: Path, tmp_path: Path) -> None:
    """`TARGET.what-it-is`: what once ended in a traceback, and its neighbours."""
    (tmp_path / "case").mkdir()
    check_target(seed.name.partition(".")[0], seed.read_bytes(), tmp_path / "case")


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(CASES[name])
    def run(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            case = Path(folder) / "case"
            case.mkdir()
            check_target(name, content, case)

    run()
