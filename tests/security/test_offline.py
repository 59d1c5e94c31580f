"""Nothing leaves the machine unless it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import Answer, process, refused

WATCHED = (
    "import sys\n"
    "def watch(event, values):\n"
    "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
    "        print('TRIED', event, values[-1], file=sys.stderr, flush=True)\n"
    "sys.addaudithook(watch)\n"
    "from peftcli.cli import main\n"
    "commands = [[]]\n"
    "for word in sys.argv[1:]:\n"
    "    commands.append([]) if word == 'THEN' else commands[-1].append(word)\n"
    "for command in commands:\n"
    "    sys.argv[1:] = command\n"
    "    try:\n        main()\n"
    "    except SystemExit as end:\n        if end.code or command is commands[-1]: raise\n"
)
LIFE = (
    ("train", "r.yaml", "--quiet"),
    ("merge", "run"),
    ("eval", "run", "--limit", "4", "--max-new-tokens", "4", "--no-latency"),
)


@pytest.fixture
def bundled_run(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(
        "model: bundled:tiny\nmethod: {name: lora, rank: 4}\n"
        "data: {train: bundled:quickstart.train, eval: 5%, limit: 60}\n"
        "training: {max_steps: 2, batch_size: 4}\noutput: run\n"
    )
    return tmp_path


def watched(*arguments: str, cwd: Path, before: tuple[str, ...] = (), **environment: str) -> Answer:
    """The program without HF_HUB_OFFLINE, every attempt to reach a network written down.

    THEN parts commands that one process runs, until the first that fails.
    """
    values = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    values.pop("CI", None)  # some libraries report nothing there
    done = subprocess.run(
        [*before, sys.executable, "-c", WATCHED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**values, **environment},
        timeout=300,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def cut_network() -> tuple[str, ...]:
    """A command that runs another without any network; skips where that is not permitted."""
    command = ("unshare", "-n")
    permitted = shutil.which("unshare") and not subprocess.run([*command, "true"]).returncode
    if not permitted:
        pytest.skip("network namespaces are not permitted here")
    return command


def test_a_whole_life_without_a_network_and_without_a_try(bundled_run: Path) -> None:
    train, merge, evaluate = LIFE
    life = (*train, "THEN", *merge, "THEN", *evaluate)
    answer = watched(*life, cwd=bundled_run, before=cut_network())
    assert answer.code == 0, answer.error
    assert "TRIED" not in answer.error
    assert (bundled_run / "run" / "merged").is_dir()
    assert (bundled_run / "run" / "eval.json").is_file()


def test_training_reports_to_nobody_where_there_is_a_network(bundled_run: Path) -> None:
    answer = watched(*LIFE[0], cwd=bundled_run)
    assert answer.code == 0, answer.error
    assert "TRIED" not in answer.error


@pytest.mark.parametrize(
    ("option", "environment"), [("--offline", {}), ("--quiet", {"HF_HUB_OFFLINE": "1"})]
)
def test_offline_opens_no_socket_for_a_name_of_the_hub(
    bundled_run: Path, option: str, environment: dict[str, str]
) -> None:
    home = {"HF_HOME": str(bundled_run / "home"), **environment}
    data = watched("train", "r.yaml", option, "--set", "data.train=a/b", cwd=bundled_run, **home)
    refused(data, 2, "a/b")
    assert "TRIED" not in data.error
    model = watched("train", "r.yaml", option, "--set", "model=a/b", cwd=bundled_run, **home)
    refused(model, 2, "model: a/b")
    assert "TRIED" not in model.error


def test_an_address_is_no_data_set(bundled_run: Path) -> None:
    setting = "data.train=https://example.com/rows.jsonl"
    refused(process("train", "r.yaml", "--set", setting, cwd=bundled_run), 2, "no such file")
