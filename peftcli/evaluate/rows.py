"""The rows of an evaluation: held-out ones of a run, or files; and text that is to be retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from peftcli.architecture.config import architecture_from
from peftcli.errors import DataError
from peftcli.evaluate.check import asked_sources
from peftcli.evaluate.choices import expanded, has_choices, read_choices
from peftcli.evaluate.options import EvalOptions
from peftcli.evaluate.preparing import (
    generation_stops,
    prepared_files,
    prepared_rows,
    sources_named,
)
from peftcli.evaluate.questions import (
    Answers,
    Item,
    Texts,
    answers_in,
    digest,
    items_of,
    spread,
)
from peftcli.evaluate.result import Rows
from peftcli.evaluate.target import Target
from peftcli.models import load_config
from peftcli.recipe.checks import longest_row
from peftcli.recipe.schema import Data
from peftcli.run_dir import cache_folder, write_atomic

MOST_POSITIONS = 4096
SHOWN = 10


@dataclass(frozen=True)
class Asked:
    """Everything that is asked of every arm."""

    items: list[Item]
    """Rows whose loss is measured."""
    questions: list[Item]
    """Rows whose answers are scored."""
    answers: Answers | None
    """What the rows are answered with, where that is a closed set."""
    options: dict[str, list[Item]]
    """Multiple choice: the possible answers of a question by its key, as rows."""
    texts: Texts
    positions: int | None
    rows: Rows
    notes: tuple[str, ...]

    def reference(self, item: Item) -> str:
        """The right answer as text."""
        return self.texts.answer(item.answer)


def load_rows(target: Target, options: EvalOptions, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """Read, tokenise and check the rows; DataError when there is nothing that can be asked."""
    architecture = architecture_from(load_config(target.base).to_dict(), target.base.name)
    positions = architecture.max_positions
    if target.loaded is not None:
        data = target.loaded.recipe.data
        data = data.model_copy(update={"max_length": longest_row(target.loaded, architecture)})
    else:
        longest = min(positions or MOST_POSITIONS, MOST_POSITIONS)
        data = Data(
            train=asked_sources(options.data, None),
            eval=None,
            max_length=longest,
            chat_template=options.chat_template,
        )
    if options.data and has_choices(options.data[0], Path.cwd()):
        return _multiple_choice(target, options, tokenizer, data, positions)
    return _held_out(target, options, tokenizer, data, positions)


def load_retained(
    path: str, limit: int, asked: Asked, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Item]:
    """The documents of a source of retained text, each cut at `max_length` tokens."""
    data = Data(train=sources_named((path,)), eval=None, max_length=max_length)
    prepared = prepared_files(data, tokenizer, 0, "--retain")
    return spread(items_of(prepared.train, asked.texts.stops, max_length), limit)


def _held_out(
    target: Target,
    options: EvalOptions,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    positions: int | None,
) -> Asked:
    prepared, leaked, notes = prepared_rows(target, options, tokenizer, data)
    held = prepared.eval if prepared.eval is not None else prepared.train
    texts = Texts(tokenizer, generation_stops(target, tokenizer, prepared.report.end_of_turn))
    items = items_of(held, texts.stops, data.max_length)
    answered = items
    trained_on = target.loaded.recipe.data.train_on if target.loaded else "answers"
    if trained_on == "all" and any(file.format != "text" for file in prepared.report.files):
        # Every token is trained on, so the answers are found with the labels of the last turn.
        last = data.model_copy(update={"train_on": "last"})
        prepared, _, _ = prepared_rows(target, options, tokenizer, last)
        held = prepared.eval if prepared.eval is not None else prepared.train
        answered = items_of(held, texts.stops, data.max_length)
    answered = [item for item in answered if item.answer]
    questions = [item for item in answered if item.whole]
    _refuse_cut(answered, questions, options.max_cut, data.max_length, texts)
    sources = [held] if held is prepared.train else [prepared.train, held]
    chosen = spread(questions, options.limit)
    cut = [item for item in answered if not item.whole]
    rows = Rows(
        source=", ".join(options.data) or "held-out rows of the run",
        held_out=len(items),
        answered=len(chosen),
        tokens=sum(label >= 0 for item in items for label in item.labels[1:]),
        leaked=leaked,
        cut=len(cut),
        cut_rows=tuple(texts.question(item)[:80] for item in cut[:SHOWN]),
        repeated=sum("-" in item.key for item in items),
        sha256=digest(items),
    )
    answers = answers_in(sources, texts) if chosen else None
    return Asked(items, chosen, answers, {}, texts, positions, rows, tuple(notes))


def _multiple_choice(
    target: Target,
    options: EvalOptions,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    positions: int | None,
) -> Asked:
    rows = [row for path in options.data for row in read_choices(path, Path.cwd())]
    text = expanded(rows)
    file = cache_folder() / "choices" / f"{sha256(text.encode()).hexdigest()[:24]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text)
    plain = data.model_copy(
        update={
            **{"train": sources_named((str(file),)), "eval": None, "format": "prompt_completion"},
            **{"columns": {}, "labels": None, "too_long": "error", "train_on": "last"},
            **{"duplicates": "keep", "limit": None},
        }
    )
    prepared = prepared_files(plain, tokenizer, 0, "--data")
    texts = Texts(tokenizer, generation_stops(target, tokenizer, prepared.report.end_of_turn))
    every = items_of(prepared.train, texts.stops, data.max_length)
    questions, possible, start = [], {}, 0
    for row in rows:
        some = every[start : start + len(row.choices)]
        start += len(row.choices)
        questions.append(some[row.right])
        possible[some[row.right].key] = some
    questions = spread(questions, options.limit)
    found = Rows(
        source=", ".join(options.data),
        held_out=len(questions),
        answered=len(questions),
        tokens=sum(len(item.answer) for item in questions),
        leaked=None,
        cut=0,
        sha256=digest(questions),
    )
    return Asked(questions, questions, None, possible, texts, positions, found, ())


def _refuse_cut(
    answered: Sequence[Item],
    whole: Sequence[Item],
    most: float,
    max_length: int,
    texts: Texts,
) -> None:
    cut = [item for item in answered if not item.whole]
    if len(cut) <= most * len(answered) and (whole or not answered):
        return
    lines = "\n".join(f"  {texts.question(item)[:90]!r}" for item in cut[:SHOWN])
    raise DataError(
        f"{len(cut)} of {len(answered)} references are longer than data.max_length {max_length} "
        f"leaves room for:\n{lines}",
        f"raise data.max_length, or allow it: --max-cut {len(cut) / len(answered):.0%}",
    )
