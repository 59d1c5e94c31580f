"""Files, folders and globs of every kind, whole and damaged."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from peftcli.data import jsonfile
from peftcli.data.hub import HubSet
from peftcli.data.jsontext import depth
from peftcli.data.sources import Source, check_exist, read_rows, resolve
from peftcli.errors import DataError

ROWS = [{"prompt": f"Frage {i}: £ 好 🙂", "completion": f"Antwort\n{i}"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_of(folder, name, **options):
    return list(read_rows(Source(name, **options), folder))


def refusal(folder, name, **options):
    with pytest.raises(DataError) as caught:
        rows_of(folder, name, **options)
    return f"{caught.value.message} | {caught.value.hint}"


def write(folder, name, content):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return name


def as_csv(rows, mark=","):
    quoted = [[f'"{value}"' for value in row.values()] for row in rows]
    return f"prompt{mark}completion\n" + "".join(mark.join(row) + "\n" for row in quoted)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.rstrip("\n")),
        ("a.jsonl", "\ufeff" + LINES),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
        ("a.jsonl", "\n \n" + LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "\ufeff " + json.dumps(ROWS, ensure_ascii=False)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"data": ROWS}, indent=2)),
        ("a.csv", as_csv(ROWS)),
        ("a.csv", as_csv(ROWS, ";")),
        ("a.csv", "\ufeff" + as_csv(ROWS)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_rows_come_out_of_every_kind(tmp_path, name, content, packed):
    if packed:
        name, content = f"{name}.gz", gzip.compress(content.encode())
    found = rows_of(tmp_path, write(tmp_path, name, content))
    assert [row.value for row in found] == ROWS
    assert not any(row.problem for row in found)


def test_parquet_rows_are_numbered(tmp_path):
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    found = rows_of(tmp_path, "a.parquet")
    assert [(row.line, row.value) for row in found] == list(enumerate(ROWS, start=1))


def test_lines_are_counted_as_an_editor_does(tmp_path):
    lines = write(tmp_path, "a.jsonl", '\n{"text": "a"}\n\n{"text": "b"}')
    assert [row.line for row in rows_of(tmp_path, lines)] == [2, 4]
    listed = write(tmp_path, "a.json", json.dumps(ROWS, indent=1))
    assert [row.line for row in rows_of(tmp_path, listed)] == [2, 6, 10, 14, 18]
    table = write(tmp_path, "a.csv", 'a,b\n"1\n2",3\n4,5\n')
    assert [row.line for row in rows_of(tmp_path, table)] == [2, 4]
    one_line = write(tmp_path, "b.json", json.dumps(ROWS))
    assert [row.place for row in rows_of(tmp_path, one_line)][:2] == [
        "b.json:1",
        "b.json:1 (row 2)",
    ]


def test_text_is_cut_at_blank_lines_or_at_every_line(tmp_path):
    name = write(tmp_path, "a.txt", "\nKing:\nSpeak.\n \nAll:\r\nSpeak!\n")
    found = rows_of(tmp_path, name)
    assert [row.value["text"] for row in found] == ["King:\nSpeak.", "All:\nSpeak!"]
    assert [row.line for row in found] == [2, 5]
    name = write(tmp_path, "b.txt", "one\ntwo\nthree")
    assert [row.value["text"] for row in rows_of(tmp_path, name)] == ["one", "two", "three"]


def test_quotes_are_letters_in_tab_separated_files(tmp_path):
    name = write(tmp_path, "a.tsv", 'sentence\tlabel\n"quoted start\t1\nwell \t0\n')
    assert [row.value for row in rows_of(tmp_path, name)] == [
        {"sentence": '"quoted start', "label": "1"},
        {"sentence": "well ", "label": "0"},
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a",}', "broken JSON"),
        (b'{"text": "a', "broken JSON"),
        (b'{"text": "\xe9t\xe9"}', "not UTF-8 (byte 0xe9, which is 'é' in latin-1)"),
        (b'{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        (b'["text"]', "the row is list, expected a JSON object"),
        (b'{"text": "\\u0000"}', "NUL"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": ' + b"[" * 2000 + b"]" * 2000 + b"}", "nested deeper than 64"),
        (b'{"text": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper than 64"),
        (b'{"n": ' + b"9" * 5000 + b"}", "thousands of digits"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, expected):
    good = b'{"text": "a \\ud83d\\ude42"}'
    found = rows_of(tmp_path, write(tmp_path, "a.jsonl", b"\n".join([good, line, good])))
    assert [row.value for row in found] == [{"text": "a 🙂"}, None, {"text": "a 🙂"}]
    assert found[1].place == "a.jsonl:2"
    assert expected in found[1].problem


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \r\n", "the file is empty"),
        ("a.csv", b"", "the file is empty"),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16"),
        ("a.jsonl", '{"text": "hello"}\n'.encode("utf-16-le"), "UTF-16"),
        ("a.jsonl", b'{"text": "a\x00b"}', "NUL"),
        ("a.jsonl", as_csv(ROWS), "starts with 'prompt,completion'"),
        ("a.jsonl", json.dumps(ROWS), "rename the file to end in .json"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        ("a.jsonl", gzip.compress(LINES.encode()), "rename it to end in .gz"),
        ("a.jsonl.gz", LINES, "broken gzip"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 999)[:-20], "broken gzip"),
        ("a.jsonl", b"PAR1abcd", "rename it to end in .parquet"),
        ("a.parquet", LINES, "not a readable Parquet file"),
        ("a.json", "[]", "the list is empty"),
        ("a.json", '[\n{"a": 1},\n{"a": 2},\n]', "a.json:4: broken JSON"),
        ("a.json", '[\n{"a": 1},\n{"a": "x', "a.json:3: broken JSON"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}]', "a.json:3: expected , or ]"),
        ("a.json", '[{"a": 1}', "the file ends before the list does"),
        ("a.json", '{"a": [{"b": 1}], "c": [{"b": 1}]}', "holds 2 lists of rows (a, c)"),
        ("a.json", b'[{"a": "\xe9"}]', "not UTF-8"),
        ("a.csv", b"a,b\n1,\xe9\n", "a.csv:2: not UTF-8"),
        ("a.csv", "a,a\n1,2\n", "the header has empty or equal names"),
        ("a.pdf", "x", "accepted: .jsonl"),
        ("a.jsonl.zst", "x", "accepted: .jsonl"),
    ],
)
def test_a_file_that_is_no_data_is_refused(tmp_path, name, content, expected):
    assert expected in refusal(tmp_path, write(tmp_path, name, content))


def test_rows_of_a_table_are_checked_one_by_one(tmp_path):
    name = write(tmp_path, "a.csv", 'a,b\n1,2\n1\n1,2,3\n"x"y,2\n3,4\n')
    found = rows_of(tmp_path, name)
    problems = [(row.line, row.problem[:22]) for row in found if row.problem]
    assert [line for line, _ in problems] == [3, 4, 5]
    assert problems[0][1] == "the row has 1 fields, "
    assert found[-1].value == {"a": "3", "b": "4"}


def test_long_lines_are_refused_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("peftcli.data.bytestream.MAX_LINE", 1000)
    name = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "' + "a" * 2000 + '"}')
    assert "a.jsonl:2: the line is longer than" in refusal(tmp_path, name)
    name = write(tmp_path, "a.csv", "a,b\n" + "c" * 2000 + ",d\n")
    assert "a.csv:2: the line is longer than" in refusal(tmp_path, name)


def test_long_lists_are_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonfile, "PIECE", 7)
    for indent in (None, 2):
        name = write(tmp_path, "a.json", json.dumps(ROWS, ensure_ascii=False, indent=indent))
        assert [row.value for row in rows_of(tmp_path, name)] == ROWS


def test_folders_globs_and_limits(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("data/b.jsonl", "data/a.jsonl", "data/deep/c.jsonl"):
        write(tmp_path, name, json.dumps({"text": name}))
    for name in ("data/README.md", "data/.hidden.jsonl"):
        write(tmp_path, name, "no rows")
    found = rows_of(tmp_path, "data")
    assert [row.file for row in found] == ["data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]
    assert [row.file for row in rows_of(tmp_path, "data/*.jsonl")] == [
        "data/a.jsonl",
        "data/b.jsonl",
    ]
    assert len(rows_of(tmp_path, "data/**/*.jsonl", limit=2)) == 2
    assert "no file has such a name" in refusal(tmp_path, "data/*.csv")


def test_a_folder_with_splits_gives_the_one_that_is_wanted(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "valid.jsonl"):
        write(tmp_path, name, json.dumps({"text": name}))
    assert [row.file for row in rows_of(tmp_path, ".")] == ["./train-0.jsonl", "./train-1.jsonl"]
    assert [row.file for row in rows_of(tmp_path, ".", split="valid")] == ["./valid.jsonl"]
    assert "several splits (valid.jsonl" in refusal(tmp_path, ".", split="development")
    (tmp_path / "empty").mkdir()
    assert "the folder holds no data file" in refusal(tmp_path, "empty")


def test_missing_files_are_answered_with_the_nearest_name(tmp_path):
    write(tmp_path, "training.jsonl", LINES)
    assert "did you mean training.jsonl" in refusal(tmp_path, "trainig.jsonl")
    assert "did you mean training.jsonl" in refusal(tmp_path, "./trainin.jsonl")
    assert "holds training.jsonl" in refusal(tmp_path, "corpus")
    assert "no such file or folder" in refusal(tmp_path, "data/nothing/here.csv")


def test_only_names_that_are_no_path_go_to_the_hub(tmp_path):
    hub = resolve(Source("openai/gsm8k", subset="main", revision="abc"), tmp_path)
    assert hub == HubSet("openai/gsm8k", "main", "train", "abc")
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "gsm8k").mkdir()
    write(tmp_path, "openai/gsm8k/a.jsonl", LINES)
    assert not isinstance(resolve(Source("openai/gsm8k"), tmp_path), HubSet)


def test_depth_counts_levels():
    assert depth({"a": [1, {"b": 2}]}) == 3
    assert depth({}) == 1


def test_every_missing_path_is_named(tmp_path):
    (tmp_path / "here.jsonl").write_text("{}\n")
    with pytest.raises(DataError) as caught:
        check_exist(["a.jsonl", "here.jsonl", "b.csv", "owner/name"], tmp_path)
    assert caught.value.message.splitlines() == [
        "a.jsonl: no such file or folder",
        "b.csv: no such file or folder",
    ]
