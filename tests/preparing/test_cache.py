"""Prepared sets are found again, never half written, and the same from any number of processes."""

import json
import os
import resource

import pytest

from peftcli.dataset import prepare
from peftcli.errors import DataError, ResourceError
from peftcli.recipe.schema import Data


def write(folder, name, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text("".join(line + "\n" for line in lines))


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def pairs(count, start=0):
    return [pair(f"Question {i}?", f"Answer {i}.") for i in range(start, start + count)]


def test_a_prepared_set_is_found_again_until_something_changes(make, tmp_path, tokenizer):
    first = make(pairs(20), eval=0.2)
    again = make(eval=0.2)
    assert (first.report.cached, again.report.cached) == (False, True)
    assert again.train[:] == first.train[:]
    assert again.eval[:] == first.eval[:]
    assert {**again.report.to_dict(), "cached": False} == first.report.to_dict()
    json.dumps(again.report.to_dict())
    assert not make(eval=0.2, max_length=100).report.cached
    assert not make(eval=0.2, seed=3).report.cached
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|user|>")
    assert make(eval=0.2).report.cached
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|>\n")
    assert not make(eval=0.2).report.cached
    write(tmp_path, "a.jsonl", pairs(21))
    assert not make(eval=0.2).report.cached
    tokenizer.add_tokens(["Question"])
    assert not make(eval=0.2).report.cached


def test_half_written_sets_are_neither_used_nor_left(make, tmp_path):
    expected = make(pairs(5)).train[:]
    [folder] = (tmp_path / "cache").iterdir()
    file = folder / "train.arrow"
    os.truncate(file, file.stat().st_size // 2)
    dead = tmp_path / "cache" / f"{folder.name}.partial-{2**22 + 1}"
    dead.mkdir()
    repaired = make()
    assert not repaired.report.cached
    assert repaired.train[:] == expected
    assert not dead.exists()
    with pytest.raises(DataError):
        make(["{"])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["big.jsonl", "big.csv"])
def test_many_processes_make_the_same_set_as_one(make, tmp_path, name, monkeypatch, tokenizer):
    rows = [pair(f"Question {i}?", f"Answer {i}." * (i % 7 + 1)) for i in range(3000)]
    if name.endswith("csv"):
        lines = ["prompt,completion", *(f"{row['prompt']},{row['completion']}" for row in rows)]
    else:
        lines = [*rows[:1000], "{", *rows[1000:]]
    monkeypatch.setattr("peftcli.data.scan.BLOCK", 10_000)
    one = make(lines, name=name, bad_rows="skip", eval=0.1)
    (tmp_path / "cache").rename(tmp_path / "other")
    seen = []
    two = prepare(
        Data(train=name, eval=0.1, bad_rows="skip"),
        tokenizer,
        base_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        seed=1,
        workers=2,
        progress=lambda share, count: seen.append((share, count)),
    )
    assert two.train[:] == one.train[:]
    assert two.eval[:] == one.eval[:]
    assert two.report.to_dict() == one.report.to_dict()
    assert seen[-1][1] == len(lines) - name.endswith("csv")
    assert seen == sorted(seen)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_and_leaves_nothing(make, tmp_path, workers):
    write(tmp_path, "a.jsonl", [pair(f"Question {i}?", "Answer. " * 40) for i in range(1000)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        with pytest.raises(ResourceError, match="the prepared data cannot be written"):
            make(workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(make(workers=workers).train) == 1000


def test_errors_of_the_other_processes_arrive(make, tmp_path):
    rows = [json.dumps(row) for row in pairs(2000)]
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\n" + b"a,b\n" * 5000 + b"\xe9,x\n")
    with pytest.raises(DataError, match=r"a.csv:5002: not UTF-8"):
        make(train="a.csv", workers=2)
    with pytest.raises(DataError, match="1 of 2001 rows are bad"):
        make([*rows, "{"], workers=2)
    assert list((tmp_path / "cache").iterdir()) == []
