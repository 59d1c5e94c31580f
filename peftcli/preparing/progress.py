"""What a run tells of its rows: how far they are, then how they were read."""

from __future__ import annotations

import time

from peftcli.data.report import DataReport, SplitReport
from peftcli.events import Listener, Note, Preparing
from peftcli.preparing.work import Progress

SECONDS = 1.0
SHOWN_FILES = 3


def told(tell: Listener) -> Progress:
    """Progress as events, one in SECONDS, so that small sets make none."""
    last = time.monotonic()

    def progress(share: float, rows: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            tell(Preparing(round(share, 4), rows))

    return progress


def tell_rows(report: DataReport, tell: Listener) -> None:
    """The form of each file and the size of both splits."""
    for file in report.files[:SHOWN_FILES]:
        tell(Note(f"{file.path}: {file.format} rows ({file.why})"))
    if len(report.files) > SHOWN_FILES:
        tell(Note(f"and {len(report.files) - SHOWN_FILES} more files"))
    train = report.train
    held = f", {report.eval.kept:,} held out" if report.eval else ", none held out"
    again = "; prepared by an earlier run" if report.cached else ""
    tell(
        Note(
            f"{train.kept:,} rows to train on{_changed(train)}{held}; {train.trained_tokens:,} of "
            f"{train.tokens:,} tokens are trained on{again}"
        )
    )


def _changed(train: SplitReport) -> str:
    """What weights and the limit did to the number of rows."""
    words = []
    if train.weighed:
        words.append(f"{abs(train.weighed):,} {'more' if train.weighed > 0 else 'fewer'} by weight")
    if train.limited:
        words.append(f"{train.limited:,} left out by data.limit")
    return f" ({', '.join(words)})" if words else ""
