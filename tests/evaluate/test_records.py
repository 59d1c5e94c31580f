"""Records of an interrupted evaluation are found again, and only by the same evaluation."""

from __future__ import annotations

from pathlib import Path

from peftcli.evaluate.records import Records


def test_results_are_found_again(tmp_path: Path) -> None:
    first = Records(tmp_path, {"arm": "a"})
    first.add({"row1": [1.5, 2], "row2": [0.1, 3]})
    # The process dies here, without closing.
    again = Records(tmp_path, {"arm": "a"})
    assert again.found == {"row1": [1.5, 2], "row2": [0.1, 3]}
    assert again.missing(["row1", "row3"]) == ["row3"]


def test_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    first = Records(tmp_path, {})
    first.add({"row1": 1, "row2": 2})
    first.close()
    first.path.write_text(first.path.read_text() + '["row3", [1, ')
    again = Records(tmp_path, {})
    assert again.missing(["row1", "row2", "row3"]) == ["row3"]
    again.add({"row3": 3})
    again.close()
    assert Records(tmp_path, {}).found == {"row1": 1, "row2": 2, "row3": 3}


def test_anything_else_that_decides_is_another_file(tmp_path: Path) -> None:
    first = Records(tmp_path, {"arm": "a", "new tokens": 16})
    first.add({"row1": 1})
    first.close()
    assert Records(tmp_path, {"arm": "b", "new tokens": 16}).found == {}
    assert Records(tmp_path, {"arm": "a", "new tokens": 32}).found == {}
    assert Records(tmp_path, {"new tokens": 16, "arm": "a"}).found == {"row1": 1}


def test_fresh_forgets(tmp_path: Path) -> None:
    first = Records(tmp_path, {})
    first.add({"row1": 1})
    first.close()
    assert Records(tmp_path, {}, fresh=True).found == {}
    assert Records(tmp_path, {}).found == {}
