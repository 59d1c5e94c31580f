"""The table of exit codes: each code that can be provoked, by a real process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import server
from hostile_files import adapter_of, change_json, copied, load_file, process, recipe, save_file

from peftcli.errors import ExitCode

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_table_lists_every_code() -> None:
    table = README.read_text("utf-8").partition("<!-- begin exit codes -->")[2]
    found = re.findall(r"^\| (\d+) \|", table.partition("<!-- end exit codes -->")[0], re.M)
    assert [int(code) for code in found] == [int(code) for code in ExitCode]


def test_done_and_usage(tmp_path: Path) -> None:
    assert process("--version").code == 0
    assert process("train", tmp_path / "absent.yaml").code == 2
    assert process("trian").code == 2


def test_resources(base_model: Path, chats: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, base_model, chats)
    answer = process("train", file, "--set", "training.device=cuda", CUDA_VISIBLE_DEVICES="")
    assert (answer.code, "Traceback" in answer.error) == (3, False), answer.error


def test_artefact_and_numbers(finished: Path, base_model: Path, tmp_path: Path) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, weights)
    options = ["--base-model", base_model, "--output", tmp_path / "merged"]
    answer = process("merge", adapter, *options)
    assert (answer.code, "Traceback" in answer.error) == (5, False), answer.error
    weights.write_bytes(weights.read_bytes()[:100])
    answer = process("merge", adapter, *options)
    assert (answer.code, "Traceback" in answer.error) == (4, False), answer.error


def test_gates(finished: Path, tmp_path: Path) -> None:
    run = copied(finished / "run", tmp_path / "run")
    quick = ("--no-latency", "--max-new-tokens", "2", "--limit", "8")
    broken = process("eval", run, *quick, "--fail-under", "exact_match=99%")
    assert (broken.code, "Traceback" in broken.error) == (10, False), broken.error
    options = ("--min-gain", "0", "--require-proof")
    answer = process("eval", run, *quick, *options)
    assert (answer.code, "Traceback" in answer.error) == (11, False), answer.error


def test_interrupted(base_model: Path, chats: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, base_model, chats)
    long = ("training.max_steps=400", "evaluation.steps=400", "training.save_steps=400")
    options = [word for setting in long for word in ("--set", setting)]
    with server().start("train", file, "--json", *options, seconds=120) as running:
        for line in running.lines():
            if json.loads(line)["event"] == "step":
                running.send(signal.SIGTERM)
                break
        assert running.end().returncode == 75


# Sends itself a signal at the N-th call of a function or of a built-in one.
AT_A_CALL = """
import os, signal, sys
from peftcli.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
calls, last, number = 0, int(sys.argv[1]), int(sys.argv[2])
def watch(frame, event, value):
    global calls
    calls += 1
    if calls == last:
        sys.setprofile(None)
        os.kill(os.getpid(), number)
sys.argv[1:] = sys.argv[3:]
try:
    sys.setprofile(watch)
    main()
finally:
    sys.setprofile(None)
    print(calls, file=sys.stderr)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_call_ends_with_75(number: signal.Signals) -> None:
    """Also while the program is imported, before Typer began to read the command line."""

    def stopped(last: int) -> subprocess.CompletedProcess[str]:
        words = [str(last), str(int(number)), "recipes", "ls"]
        command = [sys.executable, "-c", AT_A_CALL, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    calls = int(stopped(0).stderr.split()[-1])
    begun = 0 if number == signal.SIGINT else calls * 9 // 10  # before, it has no handler
    for last in (*(80, 120, 160), *(calls * part // 10 for part in range(1, 10))):
        if last < begun:
            continue
        done = stopped(last)
        assert "Traceback" not in done.stderr, (last, done.stderr)
        assert done.returncode == 75, (last, done.stderr)


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    code = "import peftcli.recipe.gallery as g\ng.entries = None\nfrom peftcli.cli import main\n"
    code += "import sys\nsys.argv = ['peftcli', 'recipes', 'ls']\nmain()\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TypeError" in done.stderr


@pytest.mark.parametrize("value", [0, -1])
def test_codes_do_not_depend_on_the_interface(finished: Path, tmp_path: Path, value: int) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", r=value)
    assert process("merge", adapter, "--json").code == 4
