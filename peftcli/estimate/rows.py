"""Rows and tokens of the training data, counted roughly and without a tokenizer."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from peftcli.data.readers import read_file
from peftcli.data.rows import DataFile
from peftcli.data.sources import Source, resolve
from peftcli.errors import DataError
from peftcli.estimate.result import Rows
from peftcli.recipe.schema import Data

SAMPLED = 1000  # rows read of each file; the rest follows from the file's size
CHARACTERS_PER_TOKEN = 4.0  # English text under vocabularies of 32,000 to 152,000
HOW = (
    "{count:,} rows of about {mean:,.0f} tokens, at 4 characters a token: no tokenizer was run, "
    "and every row is taken to be as long as data.max_length where memory is concerned"
)
TEMPLATE_TOKENS = 12  # what a chat template writes around a question and its answer


def count_rows(data: Data, base_dir: Path) -> Rows:
    """Rows and mean tokens of local files; nothing is known of sets on the hub."""
    rows, characters = 0.0, 0.0
    for source in data.train:
        try:
            places = resolve(Source(source.path, split=source.split), base_dir)
        except DataError:
            return Rows()
        if not isinstance(places, list):
            return Rows()
        for file in places:
            count, mean = _file(file)
            count = min(count, source.limit or count) * source.weight
            rows += count
            characters += count * mean
    share = data.eval if isinstance(data.eval, float) else 0.0
    kept = min(rows * (1 - share), data.limit or rows)
    if not rows:
        return Rows()
    mean_tokens = characters / rows / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
    mean, count = min(mean_tokens, float(data.max_length)), max(1, round(kept))
    return Rows(count=count, mean=mean, how=HOW.format(count=count, mean=mean))


def _file(file: DataFile) -> tuple[float, float]:
    """Rows of a file and their mean characters, from its first rows and its size."""
    lengths = [_characters(row.value) for row in islice(read_file(file), SAMPLED)]
    if not lengths:
        return 0.0, 0.0
    mean = sum(lengths) / len(lengths)
    if len(lengths) < SAMPLED:
        return float(len(lengths)), mean
    return max(float(SAMPLED), file.path.stat().st_size / (mean * 1.15)), mean


def _characters(value: Any) -> int:
    """Characters of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, dict | list):
        return 0
    total = 0  # a loop, because of the thousands of small values
    for part in value.values() if isinstance(value, dict) else value:
        total += len(part) if isinstance(part, str) else _characters(part)
    return total
