"""Multiple choice: rows that bring their own possible answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peftcli.data.messages import RowError, found
from peftcli.data.sources import Source, read_rows
from peftcli.errors import DataError
from peftcli.words import counted

QUESTIONS = ("question", "prompt", "query")
ANSWERS = ("answer", "answerKey", "gold", "label")
SHOWN = 10


@dataclass(frozen=True)
class ChoiceRow:
    """A question with its possible answers and the place of the right one."""

    question: str
    choices: tuple[str, ...]
    right: int


def has_choices(path: str, base_dir: Path) -> bool:
    """Whether the first row of the source brings `choices`."""
    first = next(iter(islice(read_rows(Source(path), base_dir), 1)), None)
    return first is not None and first.value is not None and "choices" in first.value


def read_choices(path: str, base_dir: Path) -> list[ChoiceRow]:
    """Every row; DataError with the first bad ones as FILE:LINE."""
    rows: list[ChoiceRow] = []
    bad: list[str] = []
    for raw in read_rows(Source(path), base_dir):
        try:
            if raw.value is None:
                raise RowError(raw.problem)
            rows.append(choice_row(raw.value))
        except RowError as error:
            bad.append(f"{raw.place}: {error}")
    if bad:
        lines = "\n".join(f"  {line}" for line in bad[:SHOWN])
        raise DataError(
            f"{path}: {counted(len(bad), 'row is', 'rows are')} bad:\n{lines}",
            "a row needs a question, a list of choices, and the answer as number, letter or text",
        )
    return rows


def choice_row(row: dict[str, Any]) -> ChoiceRow:
    """`{question, choices, answer}`, or ARC's `{question, choices: {text, label}, answerKey}`."""
    question = next((row[name] for name in QUESTIONS if name in row), None)
    if not isinstance(question, str) or not question.strip():
        raise RowError(f"the question is {found(question)}, expected text")
    given = row.get("choices")
    choices = given.get("text") if isinstance(given, dict) else given
    names = given.get("label") if isinstance(given, dict) else None
    if not isinstance(choices, list) or not all(isinstance(one, str) and one for one in choices):
        raise RowError(f"'choices' is {found(choices)}, expected a list of texts")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise RowError("'choices' needs at least two different texts")
    answer = next((row[name] for name in ANSWERS if name in row), None)
    return ChoiceRow(question, tuple(choices), _place(answer, choices, names))


def expanded(rows: list[ChoiceRow]) -> str:
    """One prompt and completion for each choice, as JSON lines in order."""
    pairs = [
        {"prompt": row.question, "completion": choice} for row in rows for choice in row.choices
    ]
    return "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)


def _place(answer: Any, choices: list[str], names: Any) -> int:
    if isinstance(names, list) and answer in names:
        return names.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise RowError(f"the answer is {found(answer)}, expected a number, letter or choice")
    if answer in choices:
        return choices.index(str(answer))
    place = answer if isinstance(answer, int) else _letter(answer)
    if place is None or not 0 <= place < len(choices):
        raise RowError(f"the answer {answer!r} is none of the {len(choices)} choices")
    return place


def _letter(text: str) -> int | None:
    """A -> 0; digits count from 0 as numbers do."""
    text = text.strip().rstrip(".)")
    if text.isdecimal():
        return int(text)
    return ord(text.upper()) - ord("A") if len(text) == 1 and text.isalpha() else None
