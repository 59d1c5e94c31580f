"""The page: well formed, everything escaped, readable in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from peftcli.evaluate.charts import Bar, bars, curve
from peftcli.evaluate.options import EvalOptions, Gates
from peftcli.evaluate.report_html import html_report
from peftcli.evaluate.result import Evaluation, Example
from peftcli.evaluate.run import run

EVIL = "<script>document.title='broken'</script> & \"quotes\" 'too' </pre></article>"
VOID = {"meta", "rect", "circle", "path", "br"}


@pytest.fixture(scope="module")
def evaluation(colour_run: Path) -> Evaluation:
    options = EvalOptions(resamples=300, gates=Gates(min_gain=0, fail_under={"accuracy": 0.5}))
    return run(colour_run, options, lambda event: None)


class Tree(HTMLParser):
    """Checks that tags close in order, and collects text and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Tree:
    tree = Tree()
    tree.feed(page)
    assert tree.open == []
    return tree


def with_example(evaluation: Evaluation, text: str) -> Evaluation:
    from dataclasses import replace

    example = Example(
        "k", text, text, {"base": text, "adapter": text}, {"base": 0, "adapter": 1}, text
    )
    return replace(
        evaluation, examples=(example,), source=text, recipe=text, notes=(text,), why_metrics=text
    )


def test_every_section_is_there(evaluation: Evaluation) -> None:
    tree = parsed(html_report(evaluation))
    text = " ".join(tree.text)
    for title in (
        *("Gates", "Scores", "Differences", "Forgetting", "Cost of an answer", "Loss curve"),
        *("Answers", "What was measured on what", "Recipe", "modules_to_save"),
    ):
        assert title in text
    assert tree.tags.count("article") == 10
    assert tree.tags.count("svg") == 1 + len({one.metric for one in evaluation.scores})


def test_nothing_is_fetched_and_nothing_runs(evaluation: Evaluation) -> None:
    page = html_report(evaluation)
    assert "script" not in parsed(page).tags
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)


def test_text_of_rows_stays_text(evaluation: Evaluation) -> None:
    tree = parsed(html_report(with_example(evaluation, EVIL)))
    assert "script" not in tree.tags
    assert EVIL in tree.text


def test_charts_of_odd_numbers() -> None:
    parsed(bars([Bar("base", 0.0, 0.0, 0.0, "0")]))
    parsed(bars([Bar("a<b", 3.0, -1.0, 5.0, "3 & more")]))
    parsed(curve([(1, 2.0)], []))
    parsed(curve([(1, 2.0), (2, 2.0)], [(2, 2.0)]))
    parsed(curve([(i, 8 / i) for i in range(1, 2000)], [(i, 9 / i) for i in range(1, 2000, 200)]))


def test_a_real_browser_shows_it(evaluation: Evaluation, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "report.html"
    page.write_text(html_report(with_example(evaluation, EVIL)), encoding="utf-8")
    picture = tmp_path / "page.png"
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2400"]
    shown = subprocess.run(
        [*common, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<title>&lt;script&gt;" in shown.stdout
    assert "Scores" in shown.stdout
    subprocess.run(
        [*common, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120
    )
    assert picture.stat().st_size > 20_000
