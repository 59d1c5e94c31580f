"""Which scores suit the rows, decided by what their references look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

from peftcli.metrics import read_json
from peftcli.overlap import EXTRA

MOST_LABELS = 200
ROWS_PER_LABEL = 5
LABEL_CHARACTERS = 80
LONG_WORDS = 6
SENTENCE_ENDS = (".", "!", "?", '."', "\u3002")


@dataclass(frozen=True)
class Chosen:
    """Names of metrics, the primary one first, and the reason in one line."""

    metrics: tuple[str, ...]
    why: str


def choose_metrics(references: Sequence[str], labels: Sequence[str] | None) -> Chosen:
    """The scores for these references; `labels` are the classes, if `label_set` saw some."""
    if not references:
        return Chosen((), "the rows are plain text: loss only")
    if all(read_json(text) is not None for text in references):
        return Chosen(("json_match", "json_fields", "json_valid"), "every reference is JSON")
    if all("####" in text for text in references):
        return Chosen(("number_match",), "every reference ends in `#### number`")
    if labels is not None:
        why = f"the references are {len(labels)} labels, so the likelihoods of all are compared"
        return Chosen(("accuracy", "macro_f1"), why)
    length = median(len(text.split()) for text in references)
    if length < LONG_WORDS:
        return Chosen(("exact_match",), f"references are short (median {length:g} words)")
    prose = sum(text.endswith(SENTENCE_ENDS) for text in references) > len(references) / 2
    why = f"references are long (median {length:g} words)"
    overlap = [
        name for name, of in (("chrf", "sacrebleu"), ("rouge_l", "rouge_score")) if find_spec(of)
    ]
    if not overlap:
        return Chosen(("exact_match",), f"{why}; for chrF and ROUGE-L: {EXTRA}")
    if prose:
        return Chosen((*overlap, "exact_match"), f"{why} and end as sentences")
    return Chosen(("exact_match", *overlap), f"{why} and are no sentences")


def label_set(answers: Mapping[str, int]) -> tuple[str, ...] | None:
    """The classes, where few different short answers stand for many rows; else None."""
    rows = sum(answers.values())
    few = 2 <= len(answers) <= min(MOST_LABELS, rows // ROWS_PER_LABEL)
    short = all(len(text) <= LABEL_CHARACTERS and "\n" not in text for text in answers)
    return tuple(sorted(answers)) if few and short else None
