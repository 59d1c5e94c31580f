"""The matrix of faults names tests that exist, and every fault of the kinds it lists has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.split(" | ")]
    for line in Path(__file__).with_name("matrix.txt").read_text().splitlines()
    if not line.startswith("#")
]


def test_every_row_is_whole_and_its_id_its_own() -> None:
    assert {len(row) for row in ROWS} == {5}
    assert all(all(row) for row in ROWS)
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("letter", "last"), [("C", 28), ("M", 12), ("E", 7), ("D", 14), ("B", 2)])
def test_no_number_is_left_out(letter: str, last: int) -> None:
    ids = {row[0] for row in ROWS}
    assert {f"{letter}{number:02}" for number in range(1, last + 1)} <= ids


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_row_is_held_by_a_test_that_exists(row: list[str]) -> None:
    file, _, name = row[4].partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), row[4]


def test_every_test_here_is_named_or_belongs_to_one_that_is() -> None:
    """A file of faults without a row would be a fault that nobody finds in the table."""
    named = {row[4].partition("::")[0] for row in ROWS}
    files = {f"tests/faults/{file.name}" for file in Path(__file__).parent.glob("test_*.py")}
    assert files - named == {"tests/faults/test_matrix.py"}
