"""Prepared data sets on disk: found by everything that made them, never half written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftcli import __version__
from peftcli.errors import ResourceError
from peftcli.preparing.pool import prepare_rows
from peftcli.preparing.work import Plan, Progress, SplitRows

LIBRARIES = ("tokenizers", "jinja2", "pyarrow", "datasets", "numpy")
PACKAGE = Path(__file__).parent.parent
CODE = ("data/*.py", "rendering/*.py", "preparing/*.py", "dataset.py")


def key_of(parts: dict[str, Any]) -> str:
    """A name for a prepared set: equal only when data, settings, code and libraries are."""
    code = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in PACKAGE.glob(pattern)):
        code.update(path.read_bytes())
    versions = {name: version(name) for name in LIBRARIES}
    everything = {
        "data": parts,
        "libraries": versions,
        "version": __version__,
        "code": code.hexdigest(),
    }
    text = json.dumps(everything, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds a finished set with every file at its size."""
    try:
        sizes = json.loads((folder / "files.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    return all(found.get(name) == size for name, size in sizes.items())


@contextmanager
def staging(cache_dir: Path, key: str) -> Iterator[Path]:
    """A folder to write a set into; it becomes `cache_dir/key` when the block ends well."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    for left in cache_dir.glob("*.partial-*"):
        if not _alive(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    folder = cache_dir / f"{key}.partial-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / "files.json").write_text(json.dumps(sizes), "utf-8")
        if (cache_dir / key).exists():
            shutil.rmtree(cache_dir / key)
        folder.rename(cache_dir / key)
    except OSError as error:
        raise ResourceError(
            f"{cache_dir}: the prepared data cannot be written: {error.strerror or error}",
            "free disk space; prepared data takes about three times the size of its source",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_plan(plan: Plan, folder: Path, progress: Progress) -> dict[str, SplitRows]:
    """Prepare here with one worker, else in a process of its own that forks the others."""
    if plan.workers == 1:
        return prepare_rows(plan, folder, progress)
    (folder / "plan").write_bytes(pickle.dumps(plan))
    path = os.pathsep.join(
        part for part in (str(PACKAGE.parent), os.environ.get("PYTHONPATH")) if part
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "peftcli.preparing.process", str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,
        text=True,
    )
    try:
        for line in process.stdout or ():
            progress(*json.loads(line))
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == -signal.SIGKILL:
        raise ResourceError("the process that prepares the data was killed", "free memory")
    if code:
        raise RuntimeError(f"the process that prepares the data failed with code {code}")
    result = pickle.loads((folder / "result").read_bytes())
    for name in ("plan", "result"):
        (folder / name).unlink()
    if isinstance(result, tuple):
        kind, *reason = result
        raise kind(*reason)
    rows: dict[str, SplitRows] = result
    return rows


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
