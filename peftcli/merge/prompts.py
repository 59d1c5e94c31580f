"""Token ids to compare models on: the first rows of the run's own data, or plain text."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftcli.dataset import prepare
from peftcli.errors import DataError, PeftcliError
from peftcli.recipe.schema import Data, Recipe

COUNT = 8
LONGEST = 256  # tokens of one prompt
PLAIN = (
    "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down "
    "the names of the ships that passed.",
    "Question: A train leaves at 9:40 and arrives at 12:05. How long does the journey take?\n"
    "Answer: The journey takes 2 hours and 25 minutes.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level; on high mountains it boils earlier, because "
    "the pressure of the air is lower.",
    "Le marche ouvre a huit heures, et les premiers clients attendent deja devant la porte.",
    "SELECT name, count(*) FROM orders WHERE year = 2024 GROUP BY name ORDER BY 2 DESC LIMIT 10;",
    "Dear Ms Meyer, thank you for your letter of 3 March. We have checked the invoice and found "
    "that you are right: the amount was charged twice.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765",
)


@dataclass(frozen=True)
class Prompts:
    """Rows of token ids, each of shape (tokens,)."""

    ids: tuple[torch.Tensor, ...]
    where_from: str

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return sum(len(row) for row in self.ids)

    def cut(self, tokens: int) -> Prompts:
        """The same with about this many tokens in all, none of the rows left out."""
        each = max(2, tokens // max(1, len(self.ids)))
        return Prompts(tuple(row[:each] for row in self.ids), self.where_from)


def prompts_for(recipe: Recipe | None, merged: Path, vocabulary: int) -> Prompts:
    """The first rows of the run's data as the model sees them, or plain text without them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(merged), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return _random(vocabulary)
    if recipe is not None:
        try:
            return _own(recipe, tokenizer, vocabulary)
        except PeftcliError:  # the rows are not here any more
            pass
    rows = [torch.tensor(tokenizer(text).input_ids[:LONGEST]) for text in PLAIN]
    rows = [row for row in rows if len(row) > 1 and int(row.max()) < vocabulary]
    return Prompts(tuple(rows), "plain text") if rows else _random(vocabulary)


def _own(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Prompts:
    sources = tuple(
        source.model_copy(update={"limit": min(source.limit or COUNT, COUNT), "weight": 1.0})
        for source in recipe.data.train
    )
    few: Data = recipe.data.model_copy(
        update={"train": sources, "eval": None, "limit": COUNT, "max_length": LONGEST}
    )
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(
            few, tokenizer, base_dir=Path.cwd(), cache_dir=Path(folder), seed=0, workers=1
        )
        rows = [torch.tensor(row["input_ids"]) for row in prepared.train]
    rows = [row[:LONGEST] for row in rows if len(row) > 1 and int(row.max()) < vocabulary]
    if not rows:
        raise DataError("no row of the data can be used")
    return Prompts(tuple(rows[:COUNT]), f"{len(rows[:COUNT])} rows of the run's data")


def _random(vocabulary: int) -> Prompts:
    """Without a tokenizer, any ids tell two models apart."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (COUNT, 64), generator=generator)
    return Prompts(tuple(rows), "random token ids (no tokenizer here)")
