"""The check of rows that needs no tokenizer, and runs before any heavy import."""

import json
import subprocess
import sys

import pytest

from peftcli.data.check import check_source
from peftcli.data.scan import scan
from peftcli.data.sources import Source, resolve
from peftcli.errors import DataError
from peftcli.preparing.sources import check_data, limits_of, sources_of
from peftcli.recipe.schema import Data

GOOD = {"prompt": "a", "completion": "b"}


def write(folder, name, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text)
    return name


def test_problems_are_counted_and_the_first_ten_shown(tmp_path):
    rows = [GOOD, "{", {"prompt": "a", "completion": ""}, *[{"prompt": "a"}] * 20]
    checked = check_source(Source(write(tmp_path, "a.jsonl", rows)), tmp_path)
    assert (checked.format, checked.rows, checked.bad) == ("prompt_completion", 23, 22)
    assert len(checked.problems) == 10
    assert checked.problems[0].startswith("a.jsonl:2: broken JSON")
    assert checked.problems[1] == "a.jsonl:3: 'completion' is empty"
    assert checked.problems[2] == "a.jsonl:4: 'completion' is missing, expected text"


def test_a_bad_first_row_does_not_hide_the_format(tmp_path):
    checked = check_source(Source(write(tmp_path, "a.jsonl", ["{", GOOD])), tmp_path)
    assert (checked.format, checked.bad) == ("prompt_completion", 1)
    with pytest.raises(DataError, match=r"a.jsonl:1: unknown form; columns found: x, y"):
        check_source(Source(write(tmp_path, "a.jsonl", [{"x": 1, "y": 2}])), tmp_path)


def test_every_source_of_a_recipe_is_checked(tmp_path):
    write(tmp_path, "a.jsonl", [GOOD, {"prompt": "a"}])
    write(tmp_path, "b.jsonl", [GOOD, "{"])
    with pytest.raises(DataError) as caught:
        check_data(Data(train="a.jsonl", eval="b.jsonl"), tmp_path)
    assert "2 of the first rows are bad" in caught.value.message
    assert "a.jsonl:2" in caught.value.message
    assert "b.jsonl:2" in caught.value.message
    checked = check_data(Data(train="a.jsonl", eval="b.jsonl", bad_rows="skip"), tmp_path)
    assert [one.bad for one in checked] == [1, 1]


def test_sources_take_what_they_lack_from_the_data_section():
    data = Data(
        train=["a.jsonl", {"path": "b.csv", "format": "text", "columns": {"text": "body"}}],
        format="alpaca",
        columns={"output": "answer"},
        limit=7,
    )
    first, second = sources_of(data)["train"]
    assert (first.format, first.columns) == ("alpaca", {"output": "answer"})
    assert (second.format, second.columns) == ("text", {"text": "body"})
    assert limits_of(data) == {("train", 0): 7, ("train", 1): 7}


def test_ranges_cover_a_file_and_know_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("peftcli.data.scan.BLOCK", 50)
    lines = [json.dumps({"text": "x" * (i % 40)}) + "\n" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(lines).rstrip("\n"))
    [file] = resolve(Source("a.jsonl"), tmp_path)
    found = scan(file)
    data = (tmp_path / "a.jsonl").read_bytes()
    assert sum(part.size for part in found.ranges) == found.size == len(data)
    for part in found.ranges:
        assert data[: part.start].count(b"\n") + 1 == part.line
        assert part.start == 0 or data[part.start - 1 : part.start] == b"\n"


def test_checking_rows_imports_nothing_heavy():
    code = (
        "import sys, peftcli.preparing.sources;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'jinja2')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
