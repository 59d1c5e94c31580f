"""What merge and eval read of a run folder from a stranger: damaged records end in one error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_files import DEEP, change_json, copied, peftcli, refused

QUICK = ("--no-latency", "--max-new-tokens", "2", "--limit", "2")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def endless(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "nested stops": (
        "adapter/generation_config.json",
        lambda run: (run / "adapter" / "generation_config.json").write_text(DEEP),
    ),
    "a list of stops": (
        "adapter/generation_config.json",
        lambda run: (run / "adapter" / "generation_config.json").write_text("[]"),
    ),
    "a pipe": (
        "adapter/adapter_config.json",
        lambda run: pipe(run / "adapter" / "adapter_config.json"),
    ),
    "a device": (
        "adapter/adapter_config.json",
        lambda run: endless(run / "adapter" / "adapter_config.json"),
    ),
    "a recipe of text": ("run.json", lambda run: change_json(run / "run.json", recipe="x")),
    "files of text": (
        "run.json",
        lambda run: change_json(run / "run.json", data={"files": ["a"]}),
    ),
    "a device of text": ("run.json", lambda run: change_json(run / "run.json", device="x")),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["merge", "eval"])
def test_damaged_records(finished: Path, tmp_path: Path, name: str, command: str) -> None:
    file, damage = BROKEN[name]
    run = copied(finished / "run", tmp_path / "run")
    damage(run)
    answer = peftcli(command, run, *(QUICK if command == "eval" else ()))
    if name in ("a pipe", "a device"):  # then the run holds no adapter at all
        refused(answer, 2, "holds no")
    else:
        refused(answer, 4, f"{file}: damaged")
    assert not (run / "merged").exists()


def test_a_run_without_its_device_is_merged_or_refused(finished: Path, tmp_path: Path) -> None:
    run = copied(finished / "run", tmp_path / "run")
    change_json(run / "run.json", device=None)
    refused(peftcli("merge", run), 4, "does not say in which dtype it ran")


def test_foreign_lines_of_the_metrics_are_left_out_of_the_report(
    finished: Path, tmp_path: Path
) -> None:
    run = copied(finished / "run", tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(f"{line}\n" for line in (DEEP, '{"loss": 3}', "7", '{"step": 1}', "{"))
    assert peftcli("eval", run, *QUICK).code == 0


@pytest.mark.parametrize("content", [DEEP, "[]", '{"table": {}}', json.dumps({"table": []})])
def test_an_earlier_report_that_is_none(finished: Path, tmp_path: Path, content: str) -> None:
    run = copied(finished / "run", tmp_path / "run")
    (tmp_path / "eval.json").write_text(content)
    answer = peftcli("eval", run, *QUICK, "--against", tmp_path / "eval.json")
    refused(answer, 4, "--against")
