"""Rows and tokens of the training data, counted roughly and without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from json import dumps
from os import SEEK_END
from pathlib import Path
from typing import Any

from peftcli.data.bytestream import open_data
from peftcli.data.readers import read_file
from peftcli.data.rows import DataFile, RawRow
from peftcli.data.sources import Source, resolve
from peftcli.errors import DataError
from peftcli.estimate.result import Rows
from peftcli.recipe.schema import Data

SAMPLED = 1000  # rows read of each file; the rest follows from the file's size
BYTES_PER_TOKEN = 4.0
"""UTF-8 under vocabularies of 32,000 to 152,000: a letter takes 1, a Chinese sign 3."""
HEAD = 8 << 20  # bytes in which lines are counted; the rest follows from the file's size
HOW = (
    "{count:,} rows of about {mean:,.0f} tokens, at 4 bytes of text a token: no tokenizer was run, "
    "and every row is taken to be as long as data.max_length where memory is concerned"
)
TEMPLATE_TOKENS = 12  # what a chat template writes around a question and its answer


def count_rows(data: Data, base_dir: Path) -> Rows:
    """Rows and mean tokens of local files; nothing is known of sets on the hub."""
    rows, size = 0.0, 0.0
    for source in data.train:
        try:
            places = resolve(Source(source.path, split=source.split), base_dir)
        except DataError as error:
            return Rows(unread=error.message)
        if not isinstance(places, list):
            return Rows()
        for file in places:
            count, mean = _file(file)
            count = min(count, source.limit or count) * source.weight
            rows += count
            size += count * mean
    share = data.eval if isinstance(data.eval, float) else 0.0
    kept = min(rows * (1 - share), data.limit or rows)
    if not rows:
        return Rows()
    mean_tokens = size / rows / BYTES_PER_TOKEN + TEMPLATE_TOKENS
    mean, count = min(mean_tokens, float(data.max_length)), max(1, round(kept))
    return Rows(count=count, mean=mean, how=HOW.format(count=count, mean=mean))


def _file(file: DataFile) -> tuple[float, float]:
    """Rows of a file and their mean bytes of text, from its first rows and its size."""
    sample = list(islice(read_file(file), SAMPLED))
    if not sample:
        return 0.0, 0.0
    mean = sum(_bytes_of(row.value) for row in sample) / len(sample)
    if len(sample) < SAMPLED:
        return float(len(sample)), mean
    return max(float(SAMPLED), _rows_of(file, sample)), mean


def _rows_of(file: DataFile, sample: Sequence[RawRow]) -> float:
    """All rows of a file that has more than the sample."""
    if file.kind == "parquet":
        from pyarrow.parquet import read_metadata

        return float(read_metadata(file.path).num_rows)
    with open_data(file) as handle:
        head = handle.read(HEAD)
    times = max(1.0, _unpacked_size(file) / len(head))
    if sample[0].line == sample[-1].line:  # JSON without line breaks between rows
        plain = head.isascii()
        written = sum(len(dumps(row.value, ensure_ascii=plain).encode()) + 2 for row in sample)
        return times * len(head) * len(sample) / written
    return times * head.count(b"\n") * len(sample) / sample[-1].line


def _unpacked_size(file: DataFile) -> int:
    if not file.packed:
        return file.path.stat().st_size
    with file.path.open("rb") as handle:
        handle.seek(-4, SEEK_END)  # gzip ends with the size of what it holds
        return int.from_bytes(handle.read(4), "little")


def _bytes_of(value: Any) -> int:
    """Bytes of all texts in a row, in UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
    if not isinstance(value, dict | list):
        return 0
    return sum(map(_bytes_of, value.values() if isinstance(value, dict) else value))
