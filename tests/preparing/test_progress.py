"""What a run tells while and after it prepares its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peftcli.data.report import DataReport, FileReport, SplitReport
from peftcli.events import Event, Preparing
from peftcli.preparing import progress

SPLIT = SplitReport(40, 0, 0, 0, 0, 0, 0, 0, 40, 2000, 800, 50, 60, 70, 80)


def test_progress_is_told_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Event] = []
    tell = progress.told(heard.append)
    tell(0.1, 10)
    assert heard == []  # a small set is done before anybody wonders
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    tell(0.5, 50)
    assert heard == [Preparing(0.5, 50)]


def test_rows_are_told_with_their_form() -> None:
    files = tuple(
        FileReport(f"{name}.jsonl", "train", "alpaca", "found output", 9, "0") for name in "abcde"
    )
    report = DataReport(SPLIT, None, files, "plain", (2,), 99)
    heard: list[Event] = []
    progress.tell_rows(report, heard.append)
    assert [getattr(event, "text", "") for event in heard] == [
        "a.jsonl: alpaca rows (found output)",
        "b.jsonl: alpaca rows (found output)",
        "c.jsonl: alpaca rows (found output)",
        "and 2 more files",
        "40 rows to train on, none held out; 800 of 2,000 tokens are trained on",
    ]
    heard.clear()
    progress.tell_rows(replace(report, eval=SPLIT, cached=True), heard.append)
    assert "40 held out" in getattr(heard[-1], "text", "")
    assert "prepared by an earlier run" in getattr(heard[-1], "text", "")
