"""Rows of files, counted from their first rows, beside how many there are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peftcli.estimate.rows import count_rows
from peftcli.recipe.schema import Data

ROWS = [{"prompt": f"hi {i}", "completion": "yes"} for i in range(6000)]
CHINESE = [{"prompt": "你好世界" * 20, "completion": "是的"}] * 3000


def lines(rows: list[dict[str, str]], *, escaped: bool = True) -> str:
    return "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)


def parquet(path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist(ROWS), path)


FILES: dict[str, tuple[Callable[[Path], object], int]] = {
    "short.jsonl": (lambda path: path.write_text(lines(ROWS)), 6000),
    "spaced.jsonl": (lambda path: path.write_text(lines(ROWS).replace("\n", "\n\n")), 6000),
    "chinese.jsonl": (lambda path: path.write_text(lines(CHINESE, escaped=False)), 3000),
    "escaped.jsonl": (lambda path: path.write_text(lines(CHINESE)), 3000),
    "packed.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(lines(ROWS).encode())), 6000),
    "one-line.json": (lambda path: path.write_text(json.dumps(ROWS)), 6000),
    "second-line.json": (lambda path: path.write_text("[\n" + json.dumps(ROWS)[1:]), 6000),
    "indented.json": (lambda path: path.write_text(json.dumps(ROWS, indent=4)), 6000),
    "two-lines.csv": (
        lambda path: path.write_text("question,answer\n" + '"a\nb",c\n' * 5000),
        5000,
    ),
    "paragraphs.txt": (lambda path: path.write_text("A line.\nOne more.\n\n" * 4000), 4000),
    "columns.parquet": (parquet, 6000),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_of_a_large_file(name: str, tmp_path: Path) -> None:
    write, there = FILES[name]
    write(tmp_path / name)
    found = count_rows(Data.model_validate({"train": name, "eval": None}), tmp_path)
    assert found.count == pytest.approx(there, rel=0.03)


def test_signs_of_three_bytes_are_more_tokens_than_letters(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(lines(CHINESE))
    found = count_rows(Data.model_validate({"train": "rows.jsonl", "eval": None}), tmp_path)
    assert found.mean == pytest.approx(82 * 3 / 4 + 12)
