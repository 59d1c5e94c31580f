"""The machine that the program runs on."""

from __future__ import annotations

from pathlib import Path

CACHES = ("active_file", "inactive_file")
"""What a group of processes is charged for and the kernel takes back when memory is asked for."""


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes that can be used of the machine's memory, and of what its limits allow."""
    free = _table(root / "proc/meminfo")["MemAvailable:"] * 1024
    group = root / "sys/fs/cgroup"
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text(encoding="ascii").strip().isdecimal():
        stat = _table(group / "memory.stat")
        used = int((group / "memory.current").read_text()) - sum(stat[x] for x in CACHES)
        free = min(free, int(limit.read_text()) - used)
    return free


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows}
