"""A base's weight files: what lies where, and reading a few rows of it at a time."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch

from peftcli.errors import ArtefactError
from peftcli.merge.direct import Memory, read_piece
from peftcli.untrusted import read_object
from peftcli.weightfiles import INDEX, indexed_files, read_header

SINGLE = "model.safetensors"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    begin: int = 0
    """Where its bytes begin in the file."""
    values: torch.Tensor | None = field(default=None, compare=False, repr=False)
    """The tensor itself, mapped from the file, where the file is a pickle."""

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice = slice(None), memory: Memory | None = None) -> torch.Tensor:
        """Rows along the first dimension, read from the file into memory of their own.

        With `memory`, they may lie there, until something else is read into it.
        """
        if self.values is not None:
            return self.values[rows].clone() if self.shape else self.values.clone()
        if not self.shape:
            return self._read(self.begin, (), memory)
        first, last, _ = rows.indices(self.shape[0])
        row = self.bytes // self.shape[0] if self.shape[0] else 0
        shape = (max(0, last - first), *self.shape[1:])
        return self._read(self.begin + first * row, shape, memory)

    def _read(self, offset: int, shape: tuple[int, ...], memory: Memory | None) -> torch.Tensor:
        if memory is not None:
            data = read_piece(self.file, offset, math.prod(shape) * self.dtype.itemsize, memory)
            if data.storage_offset() % self.dtype.itemsize:  # in files with an odd header
                data = data.clone()
            return data.view(self.dtype).view(shape)
        tensor = torch.empty(shape, dtype=self.dtype)
        if tensor.numel() == 0:
            return tensor
        view = tensor.view(-1).view(torch.uint8).numpy().data
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while view:
                read = stream.readinto(view)
                if not read:
                    raise ArtefactError(f"{self.file}: became shorter", "download it again")
                view = view[read:]
        return tensor


def read_checkpoint(folder: Path, *, allow_pickle: bool) -> dict[str, Stored]:
    """Every tensor of a model folder by name, in the order of its files.

    Only the files that the index names count. Raises ArtefactError for a missing, truncated or
    malformed file, and for pickles that were not allowed.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder, folder / INDEX, read_safetensors)
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE)
    pickled = [name for name in (PICKLED_INDEX, PICKLED) if (folder / name).is_file()]
    if not pickled:
        raise ArtefactError(
            f"{folder}: neither {SINGLE} nor {INDEX}", "name the folder that holds the weights"
        )
    if not allow_pickle:
        raise ArtefactError(
            f"{folder}: its weights are pickles (.bin), which can hold code",
            "convert them to safetensors, or read them restricted with --allow-pickle",
        )
    if pickled[0] == PICKLED:
        return read_pickle(folder / PICKLED)
    return _indexed(folder, folder / PICKLED_INDEX, read_pickle)


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file; raises ArtefactError when its header cannot be true."""
    try:
        with file.open("rb") as stream:
            start, header = read_header(stream, file)
    except OSError as error:
        raise ArtefactError(f"{file}: {error.strerror}", "download it again") from None
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ArtefactError(
                f"{file}: {name} has dtype {entry['dtype']}, which is not known here",
                "name a base in float32, bfloat16 or float16",
            )
        begin = start + entry["data_offsets"][0]
        found[name] = Stored(name, tuple(entry["shape"]), dtype, file, begin)
    return found


def read_pickle(file: Path) -> dict[str, Stored]:
    """The tensors of a PyTorch file, mapped, with nothing but tensors unpickled."""
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors = {str(name): tensor for name, tensor in values.items()}
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ValueError("it holds other things than tensors")
    except (
        *(UnpicklingError, RuntimeError, ValueError, OSError, EOFError, AttributeError, KeyError),
        zipfile.BadZipFile,
    ):
        # PyTorch's own message proposes to switch the restriction off.
        raise ArtefactError(
            f"{file}: not a plain file of tensors", "get the weights as safetensors"
        ) from None
    return {
        name: Stored(name, tuple(tensor.shape), tensor.dtype, file, values=tensor)
        for name, tensor in tensors.items()
    }


def _indexed(
    folder: Path, index: Path, read: Callable[[Path], dict[str, Stored]]
) -> dict[str, Stored]:
    files = indexed_files(index)
    names = read_object(index)["weight_map"]
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ArtefactError(
            f"{folder}: {len(absent)} of {len(files)} weight files are missing: {absent[0]}",
            "download them",
        )
    found: dict[str, Stored] = {}
    for file in files:
        found |= read(folder / file)
    lost = [name for name in names if name not in found]
    if lost:
        raise ArtefactError(
            f"{index}: names {lost[0]}, which is in no file of the model", "download it again"
        )
    return found
