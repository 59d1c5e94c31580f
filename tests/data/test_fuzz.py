"""Whatever bytes a file holds: rows, problems of rows, or one DataError."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peftcli.data.check import check_source
from peftcli.data.detect import detect
from peftcli.data.formats import FORMATS, reader
from peftcli.data.messages import RowError
from peftcli.data.sources import Source
from peftcli.errors import DataError

GOOD = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d \\ud83d\\ude42"}\n'
LISTED = json.dumps([json.loads(line) for line in GOOD.splitlines()]).encode()
TABLE = b'prompt,completion\na,"b\nc"\nd,e\n'
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def damaged(draw):
    """A good file with some bytes replaced, put in or cut off."""
    data = bytearray(draw(st.sampled_from([GOOD, LISTED, TABLE, TABLE.replace(b",", b"\t"), b""])))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=4))
    return bytes(data)


@quick
@given(damaged(), st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "parquet"]), st.booleans())
@example(b'{"a": ' + b"[" * 100_000, "jsonl", False)
@example(b"[" * 100_000, "json", False)
@example(b'[{"a": 1e999}, {"a": -Infinity}]', "json", False)
@example(b"\xef\xbb\xbf", "csv", False)
@example(b'"', "csv", False)
@example(b'a\n"' + b"x" * 100, "csv", False)
def test_no_file_breaks_the_readers(tmp_path, data, kind, packed):
    if packed and kind != "parquet":
        kind, data = f"{kind}.gz", gzip.compress(data)
    (tmp_path / f"a.{kind}").write_bytes(data)
    try:
        checked = check_source(Source(f"a.{kind}"), tmp_path)
    except DataError as error:
        assert error.message.startswith(f"a.{kind}")  # noqa: PT017 - either outcome is right
    else:
        assert checked.bad <= checked.rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = sorted({name for form in FORMATS.values() for name in (*form.fields, *form.optional)})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "bot"]) | JSON,
        "from": JSON,
        "content": JSON,
        "value": JSON,
        "tool_calls": st.lists(st.fixed_dictionaries({"function": JSON})) | JSON,
        "function_call": JSON,
    },
)


@quick
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(MESSAGE, max_size=3)))
def test_no_row_breaks_the_formats(row):
    for name in ("auto", *FORMATS):
        try:
            found = detect(row, name)
            read = reader(found.name, found.columns, {})(row)
        except RowError as error:
            assert str(error)  # noqa: PT017 - either outcome is right
        else:
            assert set(read) <= {"messages", "tools", "prompt", "completion", "text"}


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_row_is_refused_in_every_format(name):
    with pytest.raises(RowError):
        reader(name, {}, {})({})
