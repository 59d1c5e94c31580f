"""Files as a stranger might send them, and the program run on them in this process."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked import server
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from peftcli.cli import app

DEEP = "[" * 100_000
# Runs the program with a bound on its memory, and says the peak of it at the end.
MEASURED = (
    "import resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))\n"
    "from peftcli.cli import main\n"
    "try:\n    main()\n"
    "finally:\n"
    # Not the peak of getrusage, which a process inherits from the one that started it.
    "    lines = open('/proc/self/status').read().splitlines()\n"
    "    peak = next(int(x.split()[1]) for x in lines if x.startswith('VmHWM'))\n"
    "    print(f'peak {peak >> 10}', file=sys.stderr)\n"
)


@dataclass(frozen=True)
class Answer:
    """What the program said."""

    code: int
    out: str
    error: str


def peftcli(*arguments: str | Path) -> Answer:
    """The program in this process; a traceback becomes a failure of the test."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="peftcli")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Answer(done.exit_code, done.stdout, done.stderr)


def process(
    *arguments: str | Path, measured: bool = False, cwd: Path | None = None, **environment: str
) -> Answer:
    """The program in a process of its own; all libraries are in it, and count in its peak."""
    program = MEASURED if measured else None
    done = server().run(*arguments, program=program, cwd=cwd, environment=dict(environment))
    return Answer(done.returncode, done.stdout, done.stderr)


def fresh_and_measured(*arguments: str) -> Answer:
    """The program in a new interpreter, which has imported nothing, and the peak of it."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return Answer(done.returncode, done.stdout, done.stderr)


def refused(answer: Answer, code: int, *words: str) -> Answer:
    """Assert one clear error: the code, the words, a hint, no traceback."""
    assert answer.code == code, answer.error
    assert "Traceback" not in answer.error
    assert answer.error.count("error: ") == 1, answer.error
    assert len(answer.error) < 3000
    for word in words:
        assert word in answer.error, answer.error
    return answer


def recipe(
    folder: Path, base: Path | str, rows: Path, *, name: str = "r.yaml", more: str = ""
) -> Path:
    """A recipe of a short run."""
    file = folder / name
    file.write_text(
        f"model: {base}\nmethod: {{name: lora, rank: 4}}\n"
        f"data: {{train: {rows}, eval: 20%}}\n"
        f"training: {{max_steps: 4, batch_size: 8, save_steps: 2}}\nevaluation: {{steps: 2}}\n"
        f"output: {folder / 'run'}\n{more}"
    )
    return file


def change_json(file: Path, **values: Any) -> None:
    """Put values into a JSON file; None removes a key."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: item for key, item in content.items() if item is not None}))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def pickled(file: Path, target: Path) -> None:
    """A pickle in PyTorch's format that creates `target` when it is loaded without care."""
    torch.save({"state": Payload(target)}, file)
    plain = file.with_suffix(".plain")
    plain.write_bytes(pickle.dumps(Payload(target)))
    plain.unlink()


def as_pickle(folder: Path, stem: str) -> None:
    """Replace NAME.safetensors by NAME.bin with the same tensors."""
    names = {"model": "pytorch_model.bin", "adapter_model": "adapter_model.bin"}
    torch.save(load_file(folder / f"{stem}.safetensors"), folder / names[stem])
    (folder / f"{stem}.safetensors").unlink()


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Bytes of a safetensors file, its header as it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(*offsets: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    """One entry of a header."""
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


EIGHT = b"\0" * 8
BAD_HEADERS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header of a terabyte": struct.pack("<Q", 2**40) + b"{}",
    "a negative length": b"\xff" * 8 + b"{}",
    "a header above the limit": safetensors(b" " * ((32 << 20) + 1)),
    "no JSON": safetensors(b"{'a'"),
    "not UTF-8": safetensors(b'{"\xff": 1}'),
    "a list": safetensors([]),
    "nested without end": safetensors(b'{"a":' * 100_000),
    "a name that occurs twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
    ),
    "an entry that is no map": safetensors({"a": 7}, EIGHT),
    "an entry without offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "overlapping": safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, EIGHT + b"\0" * 4),
    "a hole": safetensors({"a": tensor(0, 8), "b": tensor(12, 20)}, b"\0" * 20),
    "trailing bytes": safetensors({"a": tensor(0, 8)}, EIGHT + b"x"),
    "cut in half": safetensors({"a": tensor(0, 8)}, EIGHT)[:-4],
    "offsets that run backwards": safetensors({"a": tensor(8, 0)}, EIGHT),
    "negative offsets": safetensors({"a": tensor(-8, 0)}, EIGHT),
    "fractions as offsets": safetensors({"a": tensor(0.0, 8.0)}, EIGHT),
    "not a number": safetensors({"a": tensor(0, float("nan"))}, EIGHT),
    "a third offset": safetensors({"a": tensor(0, 8, 8)}, EIGHT),
    "a negative side": safetensors({"a": tensor(0, 8, shape=(-1, -2))}, EIGHT),
    "true as a side": safetensors({"a": tensor(0, 4, shape=[True])}, EIGHT[:4]),
    "text as a shape": safetensors({"a": tensor(0, 8, shape="2")}, EIGHT),
    "sides that overflow": safetensors({"a": tensor(0, 8, shape=(2**62, 4, 2**62))}, EIGHT),
    "an empty tensor that overflows": safetensors({"a": tensor(0, 0, shape=(0, 2**62, 8))}),
    "a million sides": safetensors({"a": tensor(0, 8, shape=[1] * 1_000_000 + [2])}, EIGHT),
    "huge sides": safetensors({"a": tensor(0, 8, shape=[10**300] * 40)}, EIGHT),
    "an unknown dtype": safetensors({"a": tensor(0, 8, dtype="F31")}, EIGHT),
    "a map as dtype": safetensors({"a": tensor(0, 8, dtype={"F32": 1})}, EIGHT),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


def copied(folder: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(folder, target)
    return target


def adapter_of(run: Path, target: Path) -> Path:
    """A copy of a run's adapter without the fingerprint of its base."""
    copied(run / "adapter", target)
    (target / "base_fingerprint.json").unlink()
    return target


__all__ = ["load_file", "save_file"]
