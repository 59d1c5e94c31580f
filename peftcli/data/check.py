"""What is wrong with the rows of a source, seen without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from peftcli.data.bytestream import CONVERT
from peftcli.data.detect import Detection, detect
from peftcli.data.formats import label_names, reader
from peftcli.data.messages import RowError
from peftcli.data.rows import RawRow
from peftcli.data.sources import Source, read_rows
from peftcli.errors import DataError

CHECKED_ROWS = 1000
PROBED = 100
SHOWN = 10


@dataclass(frozen=True)
class Checked:
    """The rows of a source that were looked at, and the first problems as FILE:LINE: problem."""

    path: str
    format: str
    why: str
    rows: int
    bad: int
    problems: tuple[str, ...]


def check_source(source: Source, base_dir: Path, rows: int = CHECKED_ROWS) -> Checked:
    """Read the first `rows` rows; DataError when the source or its format is unknown."""
    found = list(islice(read_rows(source, base_dir), rows))
    form = form_of(found, source, source.path)
    read = reader(form.name, form.columns, label_names(source.labels))
    problems: list[str] = []
    for row in found:
        problem = row.problem
        if row.value is not None:
            try:
                read(row.value)
            except RowError as error:
                problem = str(error)
        if problem:
            problems.append(f"{row.place}: {problem}")
    shown = tuple(problems[:SHOWN])
    return Checked(source.path, form.name, form.why, len(found), len(problems), shown)


def form_of(rows: Iterable[RawRow], source: Source, shown: str) -> Detection:
    """The form of the first row that has one; DataError with the first row's reason otherwise."""
    problems: list[str] = []
    hint = "name the format with `data.format`, or the columns with `data.columns`"
    for row in islice(rows, PROBED):
        problem = row.problem
        if problem and not problems:
            hint = CONVERT if "UTF-8" in problem else "mend that row"
        if row.value is not None:
            try:
                return detect(row.value, source.format, source.columns)
            except RowError as error:
                problem = str(error)
        problems.append(f"{row.place}: {problem}")
    raise DataError(
        problems[0] if problems else f"{shown}: the file holds no rows",
        hint,
    )
