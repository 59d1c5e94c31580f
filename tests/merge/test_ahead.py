"""Reading ahead: what of a file is in memory is asked of the system itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from page_cache import forget, share_in_memory
from peft import LoraConfig

from peftcli.merge.ahead import read_ahead
from peftcli.merge.source import find_adapter


def test_the_base_is_read_while_libraries_are_imported(make_case: Callable[..., Any]) -> None:
    case = make_case("llama", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    weights = case.base / "model.safetensors"
    forget(weights)
    thread = read_ahead(find_adapter(case.adapter), str(case.base))
    assert thread is not None
    thread.join()
    deadline = time.monotonic() + 60  # the disk was asked, and may not have answered yet
    while share_in_memory(weights) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
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
