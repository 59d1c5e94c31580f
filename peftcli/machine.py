"""The machine that the program runs on."""

from __future__ import annotations

from pathlib import Path


def free_host_memory() -> int:
    """Bytes that can be used of the machine's memory, and of what its limits allow."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    values = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
    free = values["MemAvailable"] * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text(encoding="ascii").strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
