"""An earlier eval.json as the baseline of this evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftcli.errors import ArtefactError, UsageError
from peftcli.evaluate.compare import Measured
from peftcli.evaluate.result import FORMAT


def read_report(path: Path) -> dict[str, Any]:
    """An eval.json (or the folder that holds one); ArtefactError when it is none."""
    file = path / "eval.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(
            f"--against: {file}: {error.strerror}", "name the eval.json of an earlier evaluation"
        ) from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("table"), dict):
        raise ArtefactError(f"--against: {file} is no report of `peftcli eval`", "name another")
    if values.get("format") != FORMAT:
        raise ArtefactError(f"--against: {file} is of another version", "evaluate that run again")
    return values


def table_of(measured: Sequence[Measured]) -> dict[str, Any]:
    """Statistics by metric, as eval.json keeps them."""
    return {
        one.metric.name: {"keys": list(one.keys), "arms": {k: list(v) for k, v in one.arms.items()}}
        for one in measured
    }


def with_earlier(now: Measured, arm: str, report: Mapping[str, Any]) -> Measured:
    """The rows that both evaluations have, as arms `earlier` and `now`; UsageError for none."""
    name = now.metric.name
    entry = report["table"].get(name)
    if entry is None:
        names = ", ".join(report["table"]) or "nothing"
        raise UsageError(
            f"--against: the earlier report has no {name}, it has {names}",
            "evaluate the earlier run with the same metrics",
        )
    arms = entry["arms"]
    then = arm if arm in arms else "tuned" if "tuned" in arms else list(arms)[-1]
    earlier = dict(zip(entry["keys"], arms[then], strict=True))
    both = [(key, row) for key, row in zip(now.keys, now.arms[arm], strict=True) if key in earlier]
    if not both:
        raise UsageError(
            "--against: the earlier report is about other rows; none of them is here",
            "compare evaluations of the same held-out rows",
        )
    return Measured(
        now.metric,
        tuple(key for key, _ in both),
        {"earlier": [tuple(earlier[key]) for key, _ in both], "now": [row for _, row in both]},
    )
