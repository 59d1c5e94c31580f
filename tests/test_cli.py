"""The program as a user meets it: real processes, real exit codes, messages on one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Done, server
from hostile_files import peftcli as inside
from hostile_files import refused


def peftcli(*arguments: str, cwd: Path | None = None) -> Done:
    """The program in a fork of a process that has imported everything."""
    return server().run(*arguments, cwd=cwd)


def recipe(folder: Path, base: Path, rows: Path, more: str = "") -> Path:
    file = folder / "r.yaml"
    file.write_text(
        f"model: {base}\nmethod: {{name: lora, rank: 4}}\n"
        f"data: {{train: {rows}, eval: 20%}}\ntraining: {{max_steps: 3, batch_size: 8}}\n"
        f"output: {folder / 'run'}\n{more}"
    )
    return file


def test_a_run_in_plain_lines_and_as_json(
    base_model: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, base_model, rows)
    first = peftcli("train", str(file))
    assert first.returncode == 0, first.stderr
    assert "step 1/3" in first.stdout
    assert "held out after step 3" in first.stdout
    assert f"{tmp_path / 'run'}/adapter" in first.stdout
    assert f"{rows}: messages rows (found messages)" in first.stdout
    assert "32 rows to train on, 8 held out" in first.stdout
    second = peftcli("train", str(file), "--overwrite", "--json")
    assert second.returncode == 0, second.stderr
    events = [json.loads(line) for line in second.stdout.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    assert events[-1]["event"] == "result"
    capfd.readouterr()
    quiet = inside("train", file, "--overwrite", "--quiet")
    assert (quiet.code, quiet.out, capfd.readouterr().out) == (0, "", "")  # native code writes too


def test_qlora_on_a_cpu_says_nothing_of_its_libraries(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    """bitsandbytes warned that its paged optimizers are plain ones here."""
    file = recipe(tmp_path, base_model, rows)
    done = peftcli("train", str(file), "--set", "method=qlora", "--set", "method.rank=2", "--quiet")
    assert (done.returncode, done.stdout) == (0, "")
    (own,) = done.stderr.splitlines()  # of the model's 96 inputs
    assert "down_proj has 96 inputs, no multiple of 64" in own


def test_the_dry_run_shows_rows_labels_and_plan_and_writes_nothing(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    file = recipe(tmp_path, base_model, rows)
    done = peftcli("train", str(file), "--dry-run", "--set", "method.rank=2")
    assert done.returncode == 0, done.stderr
    assert "method.rank: 2  # --set method.rank=2" in done.stdout
    assert "training.learning_rate: 0.0002  # default of lora" in done.stdout
    assert "data.max_length: 256  # positions of the model; the default is 2048" in done.stdout
    assert f"# {file}:1:1" in done.stdout
    assert "messages rows" in done.stdout
    assert "<|user|>twice" in done.stdout
    assert "<|end|><<<" in done.stdout  # the token that ends a turn is trained
    assert "micro_batch_size 8" in done.stdout
    assert not (tmp_path / "run").exists()
    assert re.search(r"^  kept +32 +8$", done.stdout, re.MULTILINE)
    assert re.search(r"^  duplicates \(kept\) +0 +0$", done.stdout, re.MULTILINE)
    assert "by weight" not in done.stdout
    half = f"data.train=[{{path: {rows}, weight: 0.5}}]"
    fewer = inside("train", file, "--dry-run", "--set", half).out
    assert re.search(r"^  more by weight, less below zero +-16 +0$", fewer, re.MULTILINE)
    assert "row 1 (>>>trained<<<)" in done.stdout
    assert "outside the usual" not in done.stdout
    fast = inside("train", file, "--dry-run", "--set", "training.learning_rate=0.1")
    assert "warning: training.learning_rate: 0.1 lies outside the usual" in fast.out
    printed = inside("train", file, "--dry-run", "--json").out
    assert printed.count("\n") == 1
    report = json.loads(printed)
    assert report["report"]["train"]["kept"] == 32
    assert report["trainable_parameters"] == 2 * 4 * (128 + 96 + 96 + 128 + 3 * 160)


def test_a_dry_run_refuses_what_the_run_would_refuse_at_its_place(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    file = recipe(tmp_path, base_model, rows)
    taken = tmp_path / "notes.txt"
    taken.write_text("mine")
    for key, message in (
        (f"output={taken}", f"output: {taken} is a file"),
        ("training.report_to=[trackio]", "training.report_to: trackio is not installed"),
    ):
        done = inside("train", file, "--dry-run", "--set", key)
        assert (done.code, message in done.error) == (2, True), done.error
    assert taken.read_text() == "mine"


ERRORS = [
    (["train", "absent.yaml"], 2, "error: absent.yaml: no such recipe"),
    (["train"], 2, "Missing argument"),
    (["nonsense"], 2, "No such command"),
    (["recipes", "show", "qwen3-8b/qlra"], 2, "recipes: no recipe is called qwen3-8b/qlra"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), ERRORS)
def test_errors_are_one_message_with_an_exit_code(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = peftcli(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_there(rows: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, tmp_path / "modell", rows)
    (tmp_path / "model").mkdir()
    refused(inside("train", file), 2, "did you mean")


def test_bad_rows_are_named_by_file_and_line(base_model: Path, rows: Path, tmp_path: Path) -> None:
    rows.write_text(rows.read_text() + '{"messages": [}\n{"messages": []}\n')
    done = inside("train", recipe(tmp_path, base_model, rows))
    assert done.code == 2
    assert f"{rows}:41:" in done.error
    assert f"{rows}:42:" in done.error
    assert "data.bad_rows: skip" in done.error
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_rank_above_the_layer_is_refused_with_its_line(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    done = peftcli("train", str(recipe(tmp_path, base_model, rows)), "--set", "method.rank=64")
    assert done.returncode == 2
    assert "--set method.rank=64: method.rank: 64 is above 32" in done.stderr


def test_version() -> None:
    command = [sys.executable, "-m", "peftcli", "--version"]  # as it is started from a shell
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("peftcli 0.")
