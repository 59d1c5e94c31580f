"""A model that comes with code of its own: named, never run, and nobody is asked."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest
from forked import server
from hostile_files import adapter_of, change_json, copied, peftcli, recipe, refused

SOURCE = "open({target!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
SOURCE += "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
SOURCE += "class EvilModel(LlamaForCausalLM):\n    pass\n"


@pytest.fixture
def evil(base_model: Path, tmp_path: Path) -> Path:
    """A model of an unknown type whose config.json names classes of its own file."""
    folder = copied(base_model, tmp_path / "evil")
    (folder / "modeling_evil.py").write_text(SOURCE.format(target=str(tmp_path / "ran")))
    names = {
        "AutoConfig": "modeling_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
    }
    change_json(folder / "config.json", model_type="evil", auto_map=names)
    return folder


def test_it_is_refused_with_the_code_it_would_run(evil: Path, rows: Path, tmp_path: Path) -> None:
    code = "modeling_evil.py: EvilConfig, EvilModel"
    refused(peftcli("train", recipe(tmp_path, evil, rows)), 4, code, "trust_remote_code: true")
    refused(peftcli("chat", evil, "--prompt", "hi"), 4, code)
    refused(peftcli("eval", evil, "--data", rows), 4, code)
    assert not (tmp_path / "ran").exists()


def test_a_merge_into_it_is_refused(evil: Path, finished: Path, tmp_path: Path) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    answer = peftcli("merge", adapter, "--base-model", evil)
    refused(answer, 4, "modeling_evil.py: EvilConfig, EvilModel")
    assert not (tmp_path / "ran").exists()


def test_code_of_another_repository_is_named(evil: Path, rows: Path, tmp_path: Path) -> None:
    change_json(evil / "config.json", auto_map={"AutoConfig": "someone/else--code.Config"})
    answer = peftcli("train", recipe(tmp_path, evil, rows))
    refused(answer, 4, "code.py of someone/else: Config")


def test_a_tokenizer_with_code_is_refused(base_model: Path, rows: Path, tmp_path: Path) -> None:
    folder = copied(base_model, tmp_path / "evil")
    (folder / "tok.py").write_text(SOURCE.format(target=str(tmp_path / "ran")))
    change_json(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["tok.EvilTokenizer", None]},
    )
    refused(peftcli("train", recipe(tmp_path, folder, rows)), 4, "tok.py: EvilTokenizer")
    assert not (tmp_path / "ran").exists()


def read(terminal: int) -> bytes:
    """What was written to a terminal; nothing once the other side has closed it."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_nobody_is_asked_on_a_terminal(evil: Path, rows: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    with server().start("train", recipe(tmp_path, evil, rows), terminal=name) as process:
        os.close(theirs)
        os.write(ours, b"y\n" * 5)  # what somebody in a hurry would answer
        said, deadline = b"", time.monotonic() + 120
        while time.monotonic() < deadline:
            piece = read(ours) if select.select([ours], [], [], 0.2)[0] else b""
            said += piece
            if not piece and not process.alive():
                break
        assert process.end().returncode == 4, said
    os.close(ours)
    assert b"[y/N]" not in said
    assert b"was not run: modeling_evil.py" in said
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_known_model_stays_unread(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    folder = copied(base_model, tmp_path / "known")
    (folder / "modeling_evil.py").write_text(SOURCE.format(target=str(tmp_path / "ran")))
    names = {"AutoModelForCausalLM": "modeling_evil.EvilModel"}
    change_json(folder / "config.json", auto_map=names)
    assert peftcli("train", recipe(tmp_path, folder, rows), "--quiet").code == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_native_code_from_the_hub_is_not_fetched(
    base_model: Path, rows: Path, tmp_path: Path, key: str
) -> None:
    folder = copied(base_model, tmp_path / "kernel")
    change_json(folder / "config.json", **{key: "someone/kernel"})
    answer = peftcli("train", recipe(tmp_path, folder, rows))
    refused(answer, 4, "native code from someone/kernel", "was not fetched")


GADGETS = [
    ({"megatron_core": "evil_module"}, "megatron_core names the Python module `evil_module`"),
    (
        {"auto_mapping": {"parent_library": "evil_module", "base_model_class": "Model"}},
        "auto_mapping names the Python module `evil_module`",
    ),
    ({"auto_mapping": "evil_module"}, "auto_mapping names the Python module"),
    ({"lora_alpha": float("nan")}, "lora_alpha: nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha: inf"),
    ({"r": 1_000_000_000}, "r: 1000000000"),
    ({"r": -1}, "r: -1"),
    ({"r": True}, "r: True"),
    ({"r": "8"}, "r: 8"),
    ({"r": [8]}, "r: [8]"),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern.q_proj: 1000000000"),
]


@pytest.mark.parametrize(("values", "words"), GADGETS)
@pytest.mark.parametrize("command", ["merge", "eval"])
def test_adapter_configurations_that_name_code_or_endless_sizes(
    finished: Path, base_model: Path, rows: Path, tmp_path: Path, values, words: str, command: str
) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    change_json(adapter / "adapter_config.json", **values)
    more = ["--data", rows] if command == "eval" else ["--output", tmp_path / "merged"]
    sys.path.insert(0, str(tmp_path))
    try:
        answer = peftcli(command, adapter, "--base-model", base_model, *more)
    finally:
        sys.path.remove(str(tmp_path))
    refused(answer, 4, words)
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "ran").exists()


def test_an_unknown_field_is_a_warning(finished: Path, base_model: Path, tmp_path: Path) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", from_the_future={"a": 1})
    answer = peftcli("merge", adapter, "--base-model", base_model, "--output", tmp_path / "merged")
    assert answer.code == 0, answer.error
    assert "warning" in answer.error
    assert "from_the_future" in answer.error


def test_a_pattern_that_never_ends_is_stopped(
    finished: Path, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    endless = r"(([a-z_.0-9]+)+)+!"
    change_json(adapter / "adapter_config.json", target_modules=endless)
    started = time.monotonic()
    answer = peftcli("merge", adapter, "--base-model", base_model, "--output", tmp_path / "merged")
    refused(answer, 4, "target_modules")
    answer = peftcli("eval", adapter, "--base-model", base_model, "--data", rows)
    refused(answer, 4, "target_modules")
    assert time.monotonic() - started < 60
