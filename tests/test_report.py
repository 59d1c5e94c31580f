"""How a run looks while it goes on: plain lines for logs, JSON lines for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftcli import report
from peftcli.events import Evaluated, Note, Preparing, Saved, Step, Warned

EVENTS = [
    Preparing(0.25, 1000),
    Note("a choice"),
    Warned("something unusual"),
    Step(1, 2, 0.5, float("nan"), 2e-4, None, 1234.5, 1.25, 61.0),
    Evaluated(1, 0.5, 1.65, True),
    Saved(1, Path("checkpoint-1")),
]


def test_plain_lines_for_logs(capsys: pytest.CaptureFixture[str]) -> None:
    with report.training(quiet=False, as_json=False) as tell:
        for event in EVENTS:
            tell(event)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "preparing: 25%, 1,000 rows",
        "a choice",
        "step 1/2  loss nan  lr 2.00e-04  1,234 tokens/s  1.25 GiB  1 min 01 s left",
        "held out after step 1: loss 0.5000  perplexity 1.65  (best so far)",
    ]
    assert shown.err == "warning: something unusual\n"


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with report.training(quiet=False, as_json=True) as tell:
        for event in EVENTS:
            tell(event)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["preparing", "note", "warned", "step", "evaluated", "saved"]
    assert [event["event"] for event in found] == names
    assert found[0] == {"event": "preparing", "share": 0.25, "rows": 1000}
    assert found[3]["loss"] is None


def test_a_dry_run_follows_the_rows_only(capsys: pytest.CaptureFixture[str]) -> None:
    with report.preparing(as_json=False) as tell:
        for event in EVENTS:
            tell(event)
    assert capsys.readouterr().out == "preparing: 25%, 1,000 rows\n"
    with report.preparing(as_json=True) as tell:
        tell(EVENTS[0])
    assert capsys.readouterr().out == ""
