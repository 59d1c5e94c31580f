"""Tokens: refused in recipes, and in no file or message of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import Answer, copied, peftcli, recipe, refused

HUB = "hf_" + "Canary" * 6
CANARIES = {
    "HF_TOKEN": HUB,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Second" * 6,
    "WANDB_API_KEY": "c0ffee" * 6 + "abcd",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
    "OPENAI_API_KEY": "sk-" + "canary" * 6,
}
# Trains, merges, and evaluates.
LIFE = (
    "import sys\nfrom peftcli.cli import main\n"
    "file, run = sys.argv[1:]\n"
    "for command in (['train', file], ['merge', run], ['eval', run, '--limit', '4']):\n"
    "    sys.argv[1:] = command\n"
    "    try:\n        main()\n"
    "    except SystemExit as end:\n        if end.code:\n            raise\n"
)


def assert_silent(answer: Answer, *folders: Path) -> None:
    """Assert that no canary is in the output or in any file below the folders."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    contents = {str(file): file.read_bytes() for file in files}
    contents |= {"stdout": answer.out.encode(), "stderr": answer.error.encode()}
    for name, content in contents.items():
        for canary in CANARIES.values():
            assert canary.encode() not in content, name


def test_no_token_of_the_environment_reaches_a_run(
    base_model: Path, chats: Path, tmp_path: Path
) -> None:
    environment = {**CANARIES, "PEFTCLI_CACHE": str(tmp_path / "cache")}
    file = recipe(tmp_path, base_model, chats)
    # One fresh process for both, because libraries may read tokens when they are imported.
    command = [sys.executable, "-c", LIFE, file, tmp_path / "run"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    answer = Answer(done.returncode, done.stdout, done.stderr)
    assert answer.code == 0, answer.error
    assert (tmp_path / "run" / "adapter" / "README.md").is_file()
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    assert_silent(answer, tmp_path)


TOKENS = {
    "of the hub": f"model: {HUB}",
    "in an address": f"model: https://user:{HUB}@huggingface.co/a/b",
    "a password in an address": "model: https://user:correct-horse@example.com/a",
    "of GitHub": "model: ghp_" + "a1" * 18,
    "of a service": "model: sk-" + "a1" * 18,
    "of the environment": "model: canary-of-mlflow",
    "as a wrong type": f"seed: {HUB}",
    "under an unknown key": "hub_token: anything",
    "deeper": "model: {name: x, token: anything}",
    "in a list": f"data: {{train: [a, {HUB}]}}",
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_in_a_recipe_is_refused_and_not_repeated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in CANARIES.items():
        monkeypatch.setenv(key, value)
    file = tmp_path / "r.yaml"
    file.write_text(f"method: lora\noutput: run\n{TOKENS[name]}\n")
    answer = refused(peftcli("train", file), 2, "r.yaml:3:", "a token or a password", "HF_TOKEN")
    assert_silent(answer)
    assert "correct-horse" not in answer.error
    assert "anything" not in answer.error


def test_a_token_in_an_override_is_not_repeated(
    base_model: Path, chats: Path, tmp_path: Path
) -> None:
    file = recipe(tmp_path, base_model, chats)
    answer = peftcli("train", file, "--set", f"model.revision={HUB}")
    refused(answer, 2, "--set model.revision", "a token or a password")
    assert_silent(answer)
    answer = peftcli("train", file, "--set", f"training.learning_rate={HUB}")
    assert_silent(refused(answer, 2, "a token or a password"))


def test_honest_recipes_hold_no_token(base_model: Path, chats: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, base_model, chats, more="seed: 1234567890\n")
    revision = "0123456789abcdef0123456789abcdef01234567"
    answer = peftcli("train", file, "--dry-run", "--set", f"model.revision={revision}")
    assert answer.code == 0, answer.error


def test_tracebacks_show_no_token(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom peftcli.cli import main\nimport peftcli.recipe.gallery as gallery\n"
        f"gallery.entries = lambda: 1 / len('{HUB}'[99:]) or '{HUB}'\n"
        "sys.argv = ['peftcli', 'recipes', 'ls']\nmain()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert HUB not in done.stderr + done.stdout
    bug = code.replace(f"1 / len('{HUB}'[99:])", f"int('{HUB}')")
    done = subprocess.run([sys.executable, "-c", bug], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ValueError: invalid literal for int() with base 10: '***'" in done.stderr
    assert HUB not in done.stderr
    absent = code.replace(f"1 / len('{HUB}'[99:])", f"open('/no/{HUB}')")
    command = [sys.executable, "-c", absent]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "/no/***: no such file" in done.stderr
    assert HUB not in done.stderr


def test_an_error_that_names_a_path_with_a_token_hides_it(tmp_path: Path) -> None:
    answer = peftcli("train", tmp_path / f"{HUB}.yaml")
    assert_silent(refused(answer, 2, "***.yaml: no such recipe"))


def test_the_upload_needs_no_token_on_the_command_line(finished: Path, tmp_path: Path) -> None:
    run = copied(finished / "run", tmp_path / "run")
    for file in (run / "run.json", run / "adapter" / "README.md", run / "recipe.yaml"):
        assert "token:" not in file.read_text().replace("tokenizer:", "")
