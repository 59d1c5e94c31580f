"""One reader for each kind of file: bytes on disk -> rows with their line numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import chain, count
from typing import Any, BinaryIO, Literal

from peftcli.data.bytestream import HEAD, check_magic, lines, not_utf8, open_data, text_lines
from peftcli.data.jsonfile import json_file
from peftcli.data.jsontext import json_lines
from peftcli.data.rows import DataFile, RawRow
from peftcli.errors import DataError

PROBE = 1 << 20
MAX_FIELD = 16 << 20
MAX_COLUMNS = 10_000
PARQUET_BATCH = 64
MAX_PARQUET_BATCH = 512 << 20
MAX_PARQUET_RATIO = 100
PARQUET_RATIO_FROM = 64 << 20
HEADER = "the first line names the columns"

Reader = Callable[[BinaryIO, DataFile], Iterator[RawRow]]


def read_file(file: DataFile) -> Iterator[RawRow]:
    """Every row of `file` in order; DataError when the file is not what its name says."""
    if file.kind == "parquet":
        yield from _parquet(file)
        return
    with open_data(file) as handle:
        yield from READERS[file.kind](handle, file)


def _json_lines(handle: BinaryIO, file: DataFile) -> Iterator[RawRow]:
    start = handle.tell()
    opening = handle.read(PROBE).lstrip()
    handle.seek(start)
    if opening[:1] == b"[":
        raise DataError(f"{file.shown}:1: this is a JSON list", "rename the file to end in .json")
    if opening[:1] != b"{":
        shown = opening.split(b"\n")[0][:60].decode("utf-8", "replace").strip()
        raise DataError(
            f"{file.shown}:1: this is not JSON lines; it starts with {shown!r}",
            "each line holds one object {...}; name CSV .csv, tab-separated .tsv, text .txt",
        )
    return json_lines(handle, file)


def _csv(handle: BinaryIO, file: DataFile) -> Iterator[RawRow]:
    text = text_lines(handle, file)
    header = next(text)
    delimiter = ";" if ";" in header and "," not in header else ","
    return _table(chain([header], text), file, delimiter, csv.QUOTE_MINIMAL)


def _tsv(handle: BinaryIO, file: DataFile) -> Iterator[RawRow]:
    # Quotes are letters in tab-separated files: GLUE and most corpora hold lone ones.
    return _table(text_lines(handle, file), file, "\t", csv.QUOTE_NONE)


def _few_columns(text: Iterator[str], file: DataFile, delimiter: str) -> Iterator[str]:
    """Lines without one that would become a list of millions of fields."""
    for number, line in enumerate(text, start=1):
        if line.count(delimiter) > MAX_COLUMNS and len(line) < 100 * line.count(delimiter):
            raise DataError(
                f"{file.shown}:{number}: the line has more than {MAX_COLUMNS:,} fields", HEADER
            )
        yield line


def _table(
    text: Iterator[str], file: DataFile, delimiter: str, quoting: Literal[0, 3]
) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_FIELD)
    rows = csv.reader(
        _few_columns(text, file, delimiter), delimiter=delimiter, quoting=quoting, strict=True
    )
    try:
        header: list[str] = next(rows, [])
    except csv.Error as error:
        raise DataError(f"{file.shown}:1: broken header: {error}", HEADER) from None
    if len(set(header)) != len(header) or not all(name.strip() for name in header):
        raise DataError(
            f"{file.shown}:1: the header has empty or equal names: {', '.join(header[:12])}",
            HEADER,
        )
    while True:
        line = rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(file.shown, line, None, f"broken row: {error}")
            continue
        if not fields:
            continue
        if len(fields) != len(header):
            problem = f"the row has {len(fields)} fields, the header {len(header)}"
            yield RawRow(file.shown, line, None, problem)
        elif any("\0" in value for value in fields):
            yield RawRow(file.shown, line, None, "holds a NUL character")
        else:
            yield RawRow(file.shown, line, dict(zip(header, fields, strict=True)))


def _text(handle: BinaryIO, file: DataFile) -> Iterator[RawRow]:
    """A row for each paragraph; for each line when the first MiB has no blank line."""
    start = handle.tell()
    probe = handle.read(PROBE).replace(b"\r\n", b"\n").strip()
    handle.seek(start)
    by_paragraph = any(not line.strip() for line in probe.split(b"\n"))
    first, held = 1, list[str]()
    for number, raw in lines(handle, file):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield RawRow(file.shown, number, None, not_utf8(error))
            continue
        if "\0" in line:
            yield RawRow(file.shown, number, None, "holds a NUL character")
            continue
        if held and not (by_paragraph and line.strip()):
            yield RawRow(file.shown, first, {"text": "\n".join(held)})
            held = []
        if line.strip():
            first = first if held else number
            held.append(line)
    if held:
        yield RawRow(file.shown, first, {"text": "\n".join(held)})


def _parquet(file: DataFile) -> Iterator[RawRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with open(file.path, "rb") as handle:
            check_magic(handle.read(HEAD), file)
        with ParquetFile(file.path) as parquet:
            _check_unpacked(parquet.metadata, file)
            number = count(1)
            for batch in parquet.iter_batches(batch_size=PARQUET_BATCH):
                if batch.nbytes > MAX_PARQUET_BATCH:
                    raise DataError(
                        f"{file.shown}: {len(batch)} rows of it take {batch.nbytes >> 20} MiB",
                        "split the long values into several rows",
                    )
                for row in batch.to_pylist():
                    yield RawRow(file.shown, next(number), row)
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(
            f"{file.shown}: not a readable Parquet file: {reason}", "copy the file again"
        ) from None


def _check_unpacked(metadata: Any, file: DataFile) -> None:
    """Refuse columns that are small on disk and large in memory."""
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
            if unpacked > max(PARQUET_RATIO_FROM, MAX_PARQUET_RATIO * packed):
                raise DataError(
                    f"{file.shown}: {column.path_in_schema} unpacks to more than "
                    f"{MAX_PARQUET_RATIO} times its size",
                    "this is no text; write the file again if you trust it",
                )


READERS: dict[str, Reader] = {
    "jsonl": _json_lines,
    "json": json_file,
    "csv": _csv,
    "tsv": _tsv,
    "txt": _text,
}
