"""The identity of a base model, and headers that lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.errors import ArtefactError
from peftcli.fingerprint import FILE_NAME, Fingerprint, fingerprint, read_fingerprint


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(1000.0).reshape(10, 100), "b": torch.ones(3, dtype=torch.bfloat16)}


def test_it_counts_and_repeats(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    found = fingerprint(save(tmp_path / "m", weights))
    assert (found.tensors, found.parameters, found.bytes) == (2, 1003, 4006)
    assert fingerprint(save(tmp_path / "again", weights)) == found


def test_shards_do_not_matter(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    whole = fingerprint(save(tmp_path / "m", weights))
    (tmp_path / "s").mkdir()
    save_file({"b": weights["b"]}, tmp_path / "s" / "model-1.safetensors")
    save_file({"a": weights["a"]}, tmp_path / "s" / "model-2.safetensors")
    assert fingerprint(tmp_path / "s") == whole


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_every_change_shows(tmp_path: Path, weights: dict[str, torch.Tensor], change: str) -> None:
    before = fingerprint(save(tmp_path / "m", weights))
    other = {
        "value": {**weights, "a": weights["a"] + 1},
        "name": {"c": weights["a"], "b": weights["b"]},
        "dtype": {**weights, "a": weights["a"].to(torch.bfloat16)},
        "shape": {**weights, "a": weights["a"].reshape(100, 10)},
    }[change]
    assert fingerprint(save(tmp_path / "m", other)).digest != before.digest


def test_it_reads_back(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    found = fingerprint(save(tmp_path / "m", weights))
    assert read_fingerprint(tmp_path) is None
    (tmp_path / FILE_NAME).write_text(found.to_json())
    assert read_fingerprint(tmp_path) == found
    (tmp_path / FILE_NAME).write_text("{}")
    with pytest.raises(ArtefactError, match="not a fingerprint"):
        read_fingerprint(tmp_path)


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


LIES = {
    "empty": b"",
    "cut": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + b"\0" * 8,
    "padded": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 8,
    "giant header": (2**40).to_bytes(8, "little") + b"{}",
    "no json": (4).to_bytes(8, "little") + b"{{{{",
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}) + b"\0" * 4,
    "a list": header([1, 2]),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        fingerprint(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no \.safetensors file"):
        fingerprint(tmp_path)


def test_the_header_is_that_of_the_library(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    folder = save(tmp_path / "m", weights)
    assert set(load_file(folder / "model.safetensors")) == {"a", "b"}
    assert isinstance(fingerprint(folder), Fingerprint)
