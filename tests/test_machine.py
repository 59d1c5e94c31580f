"""What is free of the machine's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftcli.machine import free_host_memory

KIB = 1024


@pytest.mark.parametrize(
    ("limit", "free"),
    [
        (None, 800 * KIB),
        ("max", 800 * KIB),
        (str(1000 * KIB), 800 * KIB),
        (str(500 * KIB), 350 * KIB),  # of 400 in use 250 are files that were read
    ],
)
def test_files_that_were_read_leave_memory_free(
    tmp_path: Path, limit: str | None, free: int
) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    lines = "MemTotal:  2000 kB\nMemAvailable:   800 kB\nHugePages_Total: 0\n"
    (tmp_path / "proc/meminfo").write_text(lines)
    if limit is not None:
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{400 * KIB}\n")
        stat = f"anon {150 * KIB}\nactive_file {50 * KIB}\ninactive_file {200 * KIB}\n"
        (group / "memory.stat").write_text(stat)
    assert free_host_memory(tmp_path) == free


def test_this_machine_has_some() -> None:
    assert 0 < free_host_memory() < 2**50
