"""Reading ahead: what of a file is in memory is asked of the system itself."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from peftcli.merge.ahead import read_ahead
from peftcli.merge.source import find_adapter


def share_in_memory(file: Path) -> float:
    """The share of a file's pages that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), found) == 0
    return sum(one & 1 for one in found) / pages


def forget(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_the_base_is_read_while_libraries_are_imported(make_case: Callable[..., Any]) -> None:
    case = make_case("llama", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    weights = case.base / "model.safetensors"
    forget(weights)
    thread = read_ahead(find_adapter(case.adapter), str(case.base))
    assert thread is not None
    thread.join()
    assert share_in_memory(weights) == 1


def test_what_is_missing_or_hangs_is_left_to_the_merge(make_case: Callable[..., Any]) -> None:
    case = make_case("llama", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    adapter = find_adapter(case.adapter)
    (case.base / "model.safetensors").unlink()
    os.mkfifo(case.base / "model.safetensors")
    thread = read_ahead(adapter, str(case.base))
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()
    for base in (str(case.base / "absent"), "nobody/nothing"):
        assert read_ahead(adapter, base) is None
