"""Damaged and lying files: one clear error, in bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import (
    BAD_HEADERS,
    DEEP,
    adapter_of,
    change_json,
    copied,
    peftcli,
    process,
    recipe,
    refused,
)

from peftcli.errors import ArtefactError
from peftcli.fingerprint import fingerprint
from peftcli.merge.checkpoint import read_checkpoint, read_safetensors


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_headers_that_lie_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(BAD_HEADERS[name])
    for read in (lambda: read_safetensors(file), lambda: fingerprint(tmp_path)):
        with pytest.raises(ArtefactError) as caught:
            read()
        assert str(file) in caught.value.message
        assert caught.value.hint
        assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", ["cut in half", "a git-lfs pointer", "overlapping", "a hole"])
def test_every_command_names_the_damaged_file(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path, name: str
) -> None:
    base = copied(base_model, tmp_path / "base")
    (base / "model.safetensors").write_bytes(BAD_HEADERS[name])
    shown = str(base / "model.safetensors")
    refused(peftcli("train", recipe(tmp_path, base, chats)), 4, shown)
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    refused(peftcli("merge", adapter, "--base-model", base), 4, shown)
    refused(peftcli("eval", adapter, "--base-model", base, "--data", chats), 4, shown)
    (adapter / "adapter_model.safetensors").write_bytes(BAD_HEADERS[name])
    shown = str(adapter / "adapter_model.safetensors")
    refused(peftcli("merge", adapter, "--base-model", base_model), 4, shown)
    refused(peftcli("eval", adapter, "--base-model", base_model, "--data", chats), 4, shown)


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\0b"]
)
def test_an_index_that_points_elsewhere_is_refused(
    base_model: Path, chats: Path, tmp_path: Path, target: str
) -> None:
    base = copied(base_model, tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    content = {"metadata": {}, "weight_map": {"lm_head.weight": target}}
    (base / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError):
        read_checkpoint(base, allow_pickle=False)
    answer = peftcli("train", recipe(tmp_path, base, chats))
    refused(answer, 4, "model.safetensors.index.json: damaged")


@pytest.mark.parametrize("content", [DEEP, "[]", "7", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(base_model: Path, tmp_path: Path, content: str) -> None:
    base = copied(base_model, tmp_path / "base")
    (base / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ArtefactError, match="damaged"):
        read_checkpoint(base, allow_pickle=False)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [DEEP, "", "{", '"text"', '{"a": 1e999', "\0"])
def test_damaged_json_of_a_model(
    base_model: Path, chats: Path, tmp_path: Path, name: str, content: str
) -> None:
    base = copied(base_model, tmp_path / "base")
    (base / name).write_text(content)
    answer = peftcli("train", recipe(tmp_path, base, chats), "--quiet")
    if not (name == "generation_config.json" and answer.code == 0):  # the run needs none
        refused(answer, 4)


@pytest.mark.parametrize("content", [DEEP, '{"a":' * 50_000, "[]", "", "{", "7", "\xff"])
@pytest.mark.parametrize("command", ["merge", "eval", "chat"])
def test_damaged_adapter_configurations(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path, content: str, command: str
) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(content, encoding="latin-1")
    more = {"merge": [], "eval": ["--data", chats], "chat": ["--prompt", "hi"]}[command]
    answer = peftcli(command, adapter, "--base-model", base_model, *more)
    refused(answer, 4, "adapter_config.json: damaged")


def test_an_adapter_with_endless_nesting_inside_a_known_field(
    finished: Path, base_model: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    nested: object = {}
    for _ in range(400):
        nested = {"a": nested}
    change_json(adapter / "adapter_config.json", eva_config=nested, target_modules=[[["x"]]])
    answer = peftcli("merge", adapter, "--base-model", base_model, "--output", tmp_path / "m")
    refused(answer, 4)


@pytest.mark.parametrize("name", ["run.json", "adapter/base_fingerprint.json"])
def test_damaged_records_of_a_run(finished: Path, tmp_path: Path, name: str) -> None:
    run = copied(finished / "run", tmp_path / "run")
    (run / name).write_text(DEEP)
    refused(peftcli("merge", run), 4, f"{name}: damaged")


def test_a_rank_that_would_fill_the_memory_is_refused_before_it_does(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", r=10**9)
    more = ["--base-model", base_model, "--data", chats]
    answer = process("eval", adapter, *more, measured=True)
    refused(answer, 4, "r: 1000000000")
    assert int(answer.error.split()[-1]) < 1000


READ = (
    "import sys\nfrom pathlib import Path\n"
    "from peftcli.data.sources import Source, read_rows\nfrom peftcli.errors import DataError\n"
    "good = bad = 0\n"
    "try:\n"
    "    for row in read_rows(Source(sys.argv[1]), Path.cwd()):\n"
    "        good, bad = good + (row.value is not None), bad + (row.value is None)\n"
    "    print(f'read {good} {bad}')\n"
    "except DataError as error:\n    print('refused', error.message[:200])\n"
    "lines = open('/proc/self/status').read().splitlines()\n"
    "print(next(int(x.split()[1]) >> 10 for x in lines if x.startswith('VmHWM')))\n"
)


def read(file: Path) -> tuple[str, int]:
    """What reading a data file gave, and the peak in MiB of a process that does only that."""
    command = [sys.executable, "-c", READ, file.name]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=file.parent, timeout=120
    )
    said, peak = done.stdout.strip().splitlines()
    return said, int(peak)


def bomb(piece: bytes, times: int) -> bytes:
    """Gzipped repetitions of a piece."""
    packer = gzip.io.BytesIO()
    with gzip.GzipFile(fileobj=packer, mode="wb", compresslevel=6) as stream:
        for _ in range(times):
            stream.write(piece)
    return packer.getvalue()


LINE = b'{"prompt": "a", "completion": "b"}\n'
MEBI = 1 << 20
DATA = {
    "one.jsonl": (lambda: b'{"a": "' + b"x" * (70 * MEBI), "longer than 64 MiB"),
    "parts.jsonl": (lambda: b'{"a": [' + b"[]," * (20 * MEBI) + b"1]}\n", "read 0 1"),
    "maps.json": (lambda: b'[{"a": [' + b"{}," * (20 * MEBI) + b"1]}]", "holds more than"),
    "deep.jsonl": (lambda: b'{"a": ' + b"[" * (5 * MEBI) + b"\n", "read 0 1"),
    "deep.json": (lambda: b"[" * (5 * MEBI), "refused"),
    "wide.csv": (lambda: b"a," * (20 * MEBI), "fields"),
    "row.csv": (lambda: b"a,b\n" + b"1," * (20 * MEBI), "fields"),
    "row.tsv": (lambda: b"a\tb\n" + b"1\t" * (20 * MEBI), "fields"),
    "quote.csv": (lambda: b'a,b\n"' + b"x\n" * (10 * MEBI), "read 0"),
    "zeros.jsonl.gz": (lambda: bomb(b"\0" * MEBI, 200), "or no text"),
    "space.jsonl.gz": (lambda: bomb(b" " * MEBI, 200), "refused"),
    "empty.txt.gz": (lambda: bomb(b"a" + b"\n" * MEBI, 200), "unpacks to more than 200 times"),
    "rows.jsonl.gz": (lambda: bomb(LINE * 30_000, 200), "unpacks to more than 200 times"),
    "line.txt.gz": (lambda: bomb(b"a" * MEBI, 200), "unpacks to more than 200 times"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_files_are_read_in_bounded_memory(name: str, tmp_path: Path) -> None:
    make, words = DATA[name]
    (tmp_path / name).write_bytes(make())
    said, peak = read(tmp_path / name)
    assert words in said
    assert peak < 700


def test_parquet_files_that_unpack_to_a_multiple_are_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * (40 * MEBI) + str(i) for i in range(4)]})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < MEBI
    said, peak = read(tmp_path / "bomb.parquet")
    assert "unpacks to more than 100 times" in said
    assert peak < 300
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    assert "not a readable Parquet file" in read(tmp_path / "cut.parquet")[0]


def test_honest_repetition_is_read(tmp_path: Path) -> None:
    rows = b"".join(b'{"prompt": "question %d", "completion": "yes"}\n' % i for i in range(20_000))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows))
    assert read(tmp_path / "rows.jsonl.gz")[0] == "read 20000 0"


def test_special_files_do_not_hang(finished: Path, base_model: Path, tmp_path: Path) -> None:
    base = copied(base_model, tmp_path / "base")
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    refused(peftcli("merge", adapter, "--base-model", base), 4)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("/dev/zero")
    refused(peftcli("merge", adapter, "--base-model", base), 4)


def test_links_out_of_a_model_are_not_passed_on(
    finished: Path, base_model: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    base = copied(base_model, tmp_path / "base")
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    merged = tmp_path / "merged"
    (adapter / "chat_template.jinja").unlink()  # else the base's own do not count
    names = ("LICENSE", "chat_template.json", "additional_chat_templates/x.jinja")
    for link in [base / name for name in names] + [adapter / "chat_template.jinja"]:
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(secret)
        answer = peftcli("merge", adapter, "--base-model", base, "--output", merged)
        refused(answer, 4, f"{link.name}: a link to {secret}")
        assert not merged.exists()
        link.unlink()
    (base / "LICENSE").symlink_to(base / "LICENSE")  # a circle ends in no traceback
    answer = peftcli("merge", adapter, "--base-model", base, "--output", merged)
    assert "Traceback" not in answer.error


def test_links_of_the_hub_cache_are_followed(
    finished: Path, base_model: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    base = copied(base_model, repository / "blobs")
    (base / "LICENSE").write_text("as you like")
    for file in base.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    adapter_of(finished / "run", repository / "tuned")
    adapter = snapshot / "tuned"  # of a repository that holds both
    adapter.mkdir()
    for file in (repository / "tuned").iterdir():
        (adapter / file.name).symlink_to(file)
    merged = tmp_path / "merged"
    answer = peftcli("merge", adapter, "--base-model", snapshot, "--output", merged)
    assert answer.code == 0, answer.error
    assert (merged / "LICENSE").read_text() == "as you like"
    assert not (merged / "LICENSE").is_symlink()
