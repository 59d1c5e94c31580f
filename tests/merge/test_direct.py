"""Bytes reach the disk and come back as they are, wherever they begin and end."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from page_cache import forget, share_in_memory

from peftcli.errors import ArtefactError
from peftcli.merge import direct
from peftcli.merge.checkpoint import Stored
from peftcli.merge.direct import PAGE, Memory, Output, Writer, read_piece

SIZE = 20 * PAGE + 123
CHANCE = random.Random(0)
CONTENT = CHANCE.randbytes(SIZE)
EDGES = (0, 1, PAGE - 1, PAGE, PAGE + 1, 7 * PAGE, SIZE - PAGE, SIZE - 1, SIZE)
RANGES = [(begin, end) for begin in EDGES for end in EDGES if begin <= end]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(CONTENT)
    return found


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("cold", [True, False])
def test_reads_any_range(file: Path, cold: bool) -> None:
    memory = Memory()
    for begin, end in RANGES:
        if cold:
            forget(file)
        assert content(read_piece(file, begin, end - begin, memory)) == CONTENT[begin:end]


def test_reading_goes_past_the_cache_and_uses_what_is_there(file: Path) -> None:
    forget(file)
    read_piece(file, 0, SIZE, Memory())
    if share_in_memory(file) > 0:
        pytest.skip("no direct access on this file system")
    file.read_bytes()
    assert share_in_memory(file) == 1
    read_piece(file, 0, SIZE, Memory())
    assert share_in_memory(file) == 1


def test_a_file_that_became_shorter(file: Path) -> None:
    forget(file)
    for begin in (SIZE - 5, SIZE, SIZE + 3 * PAGE):
        with pytest.raises(ArtefactError, match="became shorter"):
            read_piece(file, begin, 6, Memory())


def test_pieces_need_no_more_memory_than_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "PIECE_BYTES", 3 * PAGE)
    memory = Memory()
    for begin, end in RANGES:
        pieces = direct.read_pieces(file, begin, end - begin, memory)
        assert b"".join(map(content, pieces)) == CONTENT[begin:end]
    assert len(memory.view) <= 4 * PAGE
    memory.fit(7 * PAGE)
    memory.shrink()
    assert len(memory.view) == 0


def test_values_at_an_odd_place(file: Path) -> None:
    stored = Stored("w", (5, 300), torch.float32, file, begin=PAGE + 3)
    memory = Memory()
    for rows in (slice(0, 5), slice(1, 3), slice(4, 5), slice(2, 2)):
        assert content(stored.read(rows, memory)) == content(stored.read(rows))


@pytest.mark.parametrize("pages", [1, 2, 5])
def test_writes_any_range(tmp_path: Path, pages: int) -> None:
    """Neighbours share pages, and none may overwrite what the other wrote there."""
    output = Output(tmp_path / "output", SIZE)
    memory = Memory(pages * PAGE)
    cuts = sorted({*EDGES, *(CHANCE.randrange(SIZE) for _ in range(20))})
    ranges = list(itertools.pairwise(cuts))
    CHANCE.shuffle(ranges)
    for begin, end in ranges:
        writer = Writer(output, begin, memory)
        middle = CHANCE.randint(begin, end)
        for part in (CONTENT[begin:middle], CONTENT[middle:end]):
            writer.add(torch.tensor(list(part), dtype=torch.uint8))
        writer.flush()
    output.close()
    assert (tmp_path / "output").read_bytes() == CONTENT


def test_writing_goes_past_the_cache(tmp_path: Path) -> None:
    output = Output(tmp_path / "output", SIZE)
    writer = Writer(output, 0, Memory(4 * PAGE))
    writer.add(torch.tensor(list(CONTENT), dtype=torch.uint8))
    writer.flush()
    if not output.direct:
        pytest.skip("no direct access on this file system")
    assert share_in_memory(tmp_path / "output") == pytest.approx(1 / 21)
    output.close()


def test_what_is_refused_goes_through_the_cache(tmp_path: Path) -> None:
    """Memory at an odd place is refused in direct writing, as some file systems refuse all."""
    output = Output(tmp_path / "output", SIZE)
    memory = Memory(SIZE + 1)
    memory.view[1 : SIZE + 1] = CONTENT
    output.write(memory.view[1 : SIZE + 1], 0)
    output.close()
    assert not output.direct
    assert (tmp_path / "output").read_bytes() == CONTENT


def test_a_file_system_without_direct_access(ramfs: Path) -> None:
    (ramfs / "input").write_bytes(CONTENT)
    memory = Memory()
    for begin, end in RANGES:
        assert (
            content(read_piece(ramfs / "input", begin, end - begin, memory)) == CONTENT[begin:end]
        )
    output = Output(ramfs / "output", SIZE)
    assert not output.direct
    writer = Writer(output, 0, Memory(4 * PAGE))
    writer.add(torch.tensor(list(CONTENT), dtype=torch.uint8))
    writer.flush()
    output.close()
    assert (ramfs / "output").read_bytes() == CONTENT


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "ramfs", "ramfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)
