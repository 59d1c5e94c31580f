"""Killed at any moment, or out of disk: nothing that a loader would take for a model."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import server
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config, train_steps
from transformers import AutoModelForCausalLM

from peftcli.errors import ExitCode, ResourceError
from peftcli.merge.options import MergeOptions
from peftcli.merge.run import run

KILLS = 10
# Forks a merge again and again and kills it at a random moment.
PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from peftcli.merge.options import MergeOptions
from peftcli.merge.run import run

adapter, base, output, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])

def merge(verify):
    child = os.fork()
    if child == 0:
        code = 1
        options = MergeOptions(output=output, base_model=base, verify=verify)
        try:
            run(Path(adapter), options, lambda text: None)
            code = 0
        finally:
            os._exit(code)
    return child

whole = []
for verify in (False, True):
    started = time.monotonic()
    assert os.waitpid(merge(verify), 0)[1] == 0
    whole.append(time.monotonic() - started)
    os.rename(output, output.with_name(f"whole-{verify}"))
found = []
chance = random.Random(0)
for place in range(kills):
    if output.exists():
        os.rename(output, output.with_name(f"whole{place}"))
    child = merge(bool(place % 2))
    time.sleep(whole[place % 2] * chance.random())
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    staging = output.with_name(".staging-" + output.name)
    left = sorted(item.name for item in staging.iterdir()) if staging.exists() else []
    found.append({"killed": os.WIFSIGNALED(status), "output": output.exists(), "left": left})
print(json.dumps(found))
"""


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A base of several files that takes a moment to merge, and an adapter."""
    settings = tiny_config("llama")
    settings.num_hidden_layers, settings.intermediate_size = 4, 2048
    settings.layer_types = None
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="1MB")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    tuned = get_peft_model(model.float(), config)
    train_steps(tuned)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "base", tmp_path / "adapter"


def test_kill_at_ten_random_moments(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    before = _digest(base), _digest(adapter)
    output = tmp_path / "merged"
    done = server().run(adapter, base, output, KILLS, program=PROGRAM)
    assert done.returncode == 0, done.stderr[-2000:]
    moments = json.loads(done.stdout.splitlines()[-1])
    assert any(moment["killed"] for moment in moments)
    for moment in moments:
        assert moment["output"] or moment["killed"]
    # A kill between the last rename and the end of the process finds the output there: all of it.
    first = tmp_path / "whole-True"
    for folder in (*tmp_path.glob("whole*"), *([output] if output.exists() else [])):
        assert _digest(folder, "*.safetensors") == _digest(first, "*.safetensors")
        assert {item.name for item in folder.iterdir()} == {item.name for item in first.iterdir()}
    assert (_digest(base), _digest(adapter)) == before
    shutil.rmtree(output, ignore_errors=True)
    run(adapter, MergeOptions(output=output, base_model=str(base)), lambda text: None)
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".staging")] == []
    assert AutoModelForCausalLM.from_pretrained(output).config.num_hidden_layers == 4
    assert _digest(first, "*.safetensors") == _digest(output, "*.safetensors")


def test_too_little_space(inputs: tuple[Path, Path], small_disk: Path) -> None:
    base, adapter = inputs
    options = MergeOptions(output=small_disk / "merged", base_model=str(base))
    with pytest.raises(ResourceError, match=r"MB are needed, .* are free") as caught:
        run(adapter, options, lambda text: None)
    assert caught.value.exit_code == ExitCode.RESOURCES == 3
    assert list(small_disk.iterdir()) == []


def test_disk_that_fills_up_meanwhile(inputs: tuple[Path, Path], large_disk: Path) -> None:
    """Another program takes the space between the check and the first byte."""
    base, adapter = inputs
    before = _digest(base), _digest(adapter)
    filler = large_disk / "filler"

    def fill(text: str) -> None:
        if text.startswith("writing"):
            free = shutil.disk_usage(large_disk).free
            filler.write_bytes(bytes(free - 500_000))

    options = MergeOptions(output=large_disk / "merged", base_model=str(base), verify=False)
    with pytest.raises(ResourceError, match="the disk is full"):
        run(adapter, options, fill)
    assert [item.name for item in large_disk.iterdir()] == ["filler"]
    assert (_digest(base), _digest(adapter)) == before
    filler.unlink()
    run(adapter, options, lambda text: None)
    assert (large_disk / "merged" / "model.safetensors.index.json").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from _disk(tmp_path / "small", "2m")


@pytest.fixture
def large_disk(tmp_path: Path) -> Iterator[Path]:
    yield from _disk(tmp_path / "large", "100m")


def _disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _digest(folder: Path, pattern: str = "*") -> dict[str, str]:
    files = sorted(folder.glob(pattern))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
