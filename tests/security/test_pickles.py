"""No pickle runs code: not in a base, not in an adapter, not in a checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hostile_files import adapter_of, as_pickle, copied, peftcli, pickled, recipe, refused

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


def interrupted(finished: Path, folder: Path, base: Path, chats: Path) -> Path:
    """A copy of the run as if it had been killed before its end."""
    copied(finished / "run", folder / "run")
    shutil.rmtree(folder / "run" / "adapter")
    manifest = json.loads((folder / "run" / "run.json").read_text())
    manifest["status"] = "running"
    (folder / "run" / "run.json").write_text(json.dumps(manifest))
    return recipe(folder, base, chats)


def sealed(checkpoint: Path) -> None:
    """Write sizes and hashes of the changed files into the manifest, as an attacker would."""
    file = checkpoint / "MANIFEST.json"
    manifest = json.loads(file.read_text())
    manifest["files"] = {
        str(path.relative_to(checkpoint)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint.rglob("*")
        if path.is_file() and path != file
    }
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", STATES)
def test_a_pickle_planted_in_a_checkpoint_is_not_run(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path, name: str
) -> None:
    file = interrupted(finished, tmp_path, base_model, chats)
    target = tmp_path / "planted"
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        pickled(checkpoint / name, target)
        sealed(checkpoint)
    answer = refused(peftcli("train", file, "--resume", "--quiet"), 4, name)
    assert not target.exists()
    assert "weights_only" not in answer.error
    assert "--overwrite" in answer.error


def test_a_planted_pickle_that_its_manifest_does_not_know_is_skipped(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path
) -> None:
    file = interrupted(finished, tmp_path, base_model, chats)
    target = tmp_path / "planted"
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        pickled(checkpoint / "optimizer.pt", target)
    refused(peftcli("train", file, "--resume", "--quiet"), 4, "every checkpoint is damaged")
    assert not target.exists()


def test_a_state_that_unpacks_to_more_than_its_size_is_refused(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path
) -> None:
    file = interrupted(finished, tmp_path, base_model, chats)
    bomb = tmp_path / "bomb.pt"
    torch.save({"state": torch.zeros(25_000_000)}, bomb)
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        state = checkpoint / "optimizer.pt"
        with (
            zipfile.ZipFile(bomb) as plain,
            zipfile.ZipFile(state, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry))
        assert state.stat().st_size < 200_000
        sealed(checkpoint)
    answer = peftcli("train", file, "--resume", "--quiet")
    assert answer.code == 4, answer.error
    assert "compressed" in answer.error


def test_a_base_of_pickles_is_refused_by_every_command(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path
) -> None:
    base = copied(base_model, tmp_path / "base")
    as_pickle(base, "model")
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    refused(peftcli("train", recipe(tmp_path, base, chats)), 4, "safetensors")
    merged = peftcli("merge", adapter, "--base-model", base, "--output", tmp_path / "merged")
    refused(merged, 4, "--allow-pickle", "safetensors")
    asked = peftcli("eval", adapter, "--base-model", base, "--data", chats)
    refused(asked, 4, "safetensors")


@pytest.mark.parametrize("command", ["merge", "eval", "chat"])
def test_an_adapter_of_pickles_is_refused(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path, command: str
) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    target = tmp_path / "planted"
    pickled(adapter / "adapter_model.bin", target)
    more = {"merge": [], "eval": ["--data", chats], "chat": ["--prompt", "hi"]}[command]
    answer = refused(peftcli(command, adapter, "--base-model", base_model, *more), 4, "pickle")
    assert not target.exists()
    assert "weights_only" not in answer.error


def test_allow_pickle_reads_tensors_and_nothing_else(
    finished: Path, base_model: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(finished / "run", tmp_path / "adapter")
    as_pickle(adapter, "adapter_model")
    options = ["--base-model", base_model, "--allow-pickle"]
    done = peftcli("merge", adapter, *options, "--output", tmp_path / "merged")
    assert done.code == 0, done.error
    target = tmp_path / "planted"
    pickled(adapter / "adapter_model.bin", target)
    answer = peftcli("merge", adapter, *options, "--output", tmp_path / "again")
    refused(answer, 4, "not a plain file of tensors")
    assert not target.exists()
    assert not (tmp_path / "again").exists()


def test_what_a_run_leaves_holds_only_restricted_pickles(finished: Path) -> None:
    found = {file.name for file in (finished / "run").rglob("*") if file.suffix in (".pt", ".bin")}
    assert found == {"optimizer.pt", "scheduler.pt"}
    assert not list((finished / "run").rglob("training_args*"))
    assert not list((finished / "run" / "adapter").rglob("*.p*"))
