"""What preparing found -> a report, warnings, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np  # noqa: TID253 - this file is heavy

from peftcli.data.report import DataReport, FileReport, SplitReport
from peftcli.errors import DataError
from peftcli.preparing.arrange import Arranged, Index
from peftcli.preparing.work import SHOWN, SplitRows
from peftcli.recipe.schema import Data
from peftcli.words import counted


def refuse(rows: Mapping[str, SplitRows], data: Data) -> None:
    """Raise DataError for bad rows, too long rows and splits without anything to train on."""
    for split, known in rows.items():
        bad, long = known.counts["bad"], known.counts["too_long"]
        if bad and data.bad_rows == "error":
            raise DataError(
                _listed(f"data.{split}: {bad} of {known.counts['read']} rows are bad", known.bad),
                "mend them, or write `data.bad_rows: skip` to leave them out",
            )
        if long and data.too_long == "error":
            raise DataError(
                _listed(
                    f"data.{split}: {counted(long, 'row is', 'rows are')} longer than max_length "
                    f"{data.max_length}",
                    known.too_long,
                ),
                "raise `data.max_length`, or write `data.too_long: truncate` or `drop`",
            )
        if not len(known.lengths):
            raise DataError(
                f"data.{split}: nothing is left to train on: {_reasons(known, data.max_length)}",
                "look at the rows, `data.max_length` and `data.train_on`",
            )


def report_of(
    rows: Mapping[str, SplitRows],
    arranged: Arranged,
    files: Sequence[FileReport],
    template: str,
    stops: tuple[int, ...],
    data: Data,
) -> DataReport:
    """Counts of both splits and everything that looks wrong."""
    held = None
    if arranged.eval is not None:
        held = _split(rows[arranged.eval_split], arranged.eval, arranged, "eval")
    warnings = [*arranged.warnings]
    for split, known in rows.items():
        warnings += [f"data.{split}: {line}" for line in _warnings(known, data)]
    return DataReport(
        train=_split(rows["train"], arranged.train, arranged, "train"),
        eval=held,
        files=tuple(files),
        template=template,
        end_of_turn=stops,
        largest_id=max(known.largest_id for known in rows.values()),
        warnings=tuple(warnings),
    )


def read_report(stored: dict[str, Any]) -> DataReport:
    """A report from its JSON form."""
    return DataReport(
        train=_read_split(stored["train"]),
        eval=_read_split(stored["eval"]) if stored["eval"] else None,
        files=tuple(FileReport(**file) for file in stored["files"]),
        template=stored["template"],
        end_of_turn=tuple(stored["end_of_turn"]),
        largest_id=stored["largest_id"],
        warnings=tuple(stored["warnings"]),
        cached=True,
    )


def _read_split(stored: dict[str, Any]) -> SplitReport:
    return SplitReport(**{**stored, "bad_rows": tuple(stored["bad_rows"])})


def _split(known: SplitRows, chosen: Index, arranged: Arranged, split: str) -> SplitReport:
    lengths = known.lengths[chosen]
    quantiles = np.percentile(lengths, (50, 90, 99, 100), method="inverted_cdf").astype(int)
    own = split == "train" or arranged.eval_split == "eval"
    counts = known.counts if own else dict.fromkeys(known.counts, 0)
    return SplitReport(
        read=counts.get("read", 0),
        bad=counts.get("bad", 0),
        too_long=counts.get("too_long", 0),
        truncated=counts.get("truncated", 0),
        split=counts.get("split", 0),
        answer_cut=counts.get("answer_cut", 0),
        untrained=counts.get("untrained", 0),
        duplicates=arranged.duplicates[split] if own else 0,
        overlap=arranged.overlap if split == "eval" else 0,
        kept=len(chosen),
        tokens=int(lengths.sum(dtype=np.int64)),
        trained_tokens=int(known.trained[chosen].sum(dtype=np.int64)),
        length_p50=int(quantiles[0]),
        length_p90=int(quantiles[1]),
        length_p99=int(quantiles[2]),
        length_max=int(quantiles[3]),
        weighed=arranged.weighed if split == "train" else 0,
        limited=arranged.limited if split == "train" else 0,
        bad_rows=tuple(known.bad) if own else (),
    )


def _listed(what: str, lines: Sequence[str]) -> str:
    first = f", the first {len(lines)} of them" if len(lines) == SHOWN else ""
    return f"{what}{first}:\n" + "\n".join(f"  {line}" for line in lines)


def _reasons(known: SplitRows, max_length: int) -> str:
    names = {
        "bad": "bad",
        "too_long": f"longer than max_length {max_length}",
        "answer_cut": "whose answers lie beyond max_length",
        "untrained": "without an answer to train on",
    }
    found = [f"{known.counts[key]} {text}" for key, text in names.items() if known.counts[key]]
    read = known.counts["read"]
    return ", ".join([f"{counted(read, 'row')} read", *found]) if read else "no rows"


def _were(rows: int) -> str:
    return counted(rows, "row was", "rows were")


def _warnings(known: SplitRows, data: Data) -> list[str]:
    counts, lines = known.counts, list[str]()
    if counts["controls"]:
        lines.append(
            f"{counted(counts['controls'], 'row holds', 'rows hold')} control tokens typed inside "
            "messages; the tokenizer cannot tell them from real ones"
        )
    if counts["lost"]:
        lines.append(
            "the chat template leaves out a part of the last answer in "
            f"{counted(counts['lost'], 'row')} (often the thinking), so that part is not trained on"
        )
    if counts["split"]:
        lines.append(
            f"{_were(counts['split'])} split into {counts['pieces']} at max_length "
            f"{data.max_length}; each piece counts as a row"
        )
    left_out = data.too_long == "drop"
    if counts["truncated"]:
        lines.append(f"{_were(counts['truncated'])} cut at max_length {data.max_length}")
    if counts["answer_cut"]:
        lines.append(
            f"{_were(counts['answer_cut'])} left out, because no answer was left within "
            f"max_length {data.max_length}"
        )
    elif counts["too_long"] and left_out:
        lines.append(f"{_were(counts['too_long'])} left out: longer than max_length")
    if counts["untrained"]:
        lines.append(f"{_were(counts['untrained'])} left out: nothing in such a row is trained on")
    if counts["unknown"] * 100 > counts["tokens"]:
        share = counts["unknown"] / counts["tokens"]
        lines.append(
            f"{share:.1%} of the tokens are unknown to the tokenizer; is it the right one?"
        )
    return lines
