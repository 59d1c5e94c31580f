"""Our bottleneck method passes PEFT's own tests; needs a checkout named by PEFT_SOURCE."""

from __future__ import annotations

import importlib.util
import os
import runpy
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("PEFT_SOURCE")


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUT, reason="PEFT_SOURCE names no checkout of PEFT")
@pytest.mark.skipif(
    not importlib.util.find_spec("diffusers"), reason="PEFT's tests import diffusers"
)
def test_peft_suite_passes() -> None:
    run = runpy.run_path(str(Path(__file__).with_name("run.py")))["run"]
    result = run(Path(CHECKOUT or ""))
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
