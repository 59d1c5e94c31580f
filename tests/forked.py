"""Real processes that start at once: forks of one process that has imported everything.

A fresh `python -m peftcli` imports for many seconds before it does anything. One server for each
test process imports once; every program is then a child of its own, with its own exit code,
signals, environment and streams. What a library reads when it is imported (HF_HOME,
HF_HUB_OFFLINE, ...) is the server's: a test about that needs a fresh process.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # new threads in a fork trip an assertion of PyTorch
    "CUDA_VISIBLE_DEVICES": "",  # a driver that was started before the fork is of no use after it
}
MODULES = (
    *("cli", "estimate.command", "evaluate.chat", "evaluate.run", "evaluate.show", "merge.run"),
    *("merge.show", "methods.bottleneck_tuner", "train.dry_run", "train.measure", "train.run"),
)


@dataclass(frozen=True)
class Done:
    """How a process ended: its exit code, or the negative number of the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A process that was started; leaving its `with` block kills it if it still runs."""

    def __init__(self, server: Server, pid: int, folder: Path) -> None:
        self._server, self.pid, self._folder = server, pid, folder

    def lines(self) -> Iterator[str]:
        """The lines of standard output as they come, until the process ends."""
        with (self._folder / "out").open() as stream:
            begun, last = "", False
            while True:
                begun += stream.readline()
                if begun.endswith("\n"):
                    yield begun
                    begun = ""
                elif last:
                    return
                else:
                    last = self._server.ended(0.005)

    def alive(self) -> bool:
        """Whether it still runs."""
        return not self._server.ended(0.0)

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.alive():
            os.kill(self.pid, number)

    def end(self) -> Done:
        """Wait for the end; a process that outlives the seconds it was given is killed."""
        status, late = self._server.result()
        output, errors = (self._folder / name for name in ("out", "err"))
        done = Done(
            os.waitstatus_to_exitcode(status),
            output.read_text(errors="replace"),
            errors.read_text(errors="replace"),
        )
        if late:
            raise RuntimeError(f"it did not end in time: {done}")
        return done

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._server.clear()


class Server:
    """The process that is forked; it runs one program at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="peftcli-forked-")
        self._process = subprocess.Popen(
            command_of("forked"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that `select` tells whether there is an answer
            env={**os.environ, **ENVIRONMENT, "HF_HOME": self._folder.name},  # nobody's token
        )
        self._current: Running | None = None
        self._result: tuple[int, bool] | None = None

    def start(
        self,
        *arguments: object,
        program: str | None = None,
        cwd: Path | None = None,
        environment: dict[str, str | None] | None = None,
        terminal: str | None = None,
        seconds: float = 300.0,
    ) -> Running:
        """`peftcli ARGUMENTS`, or Python code, in a process of its own.

        The environment is the one of the caller, with these variables set (or removed, with None).
        `terminal` is the path of a terminal to be the three standard streams; without one there is
        no input.
        """
        self.clear()
        changed = {**os.environ, **ENVIRONMENT, **(environment or {})}
        order = {
            "arguments": [str(argument) for argument in arguments],
            "program": program,
            "cwd": str(cwd or Path.cwd()),
            "environment": {name: text for name, text in changed.items() if text is not None},
            "terminal": terminal,
            "folder": self._folder.name,
            "seconds": seconds,
        }
        for name in ("out", "err"):  # nobody shall read what the last one said
            Path(self._folder.name, name).write_bytes(b"")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._result = None
        self._current = Running(self, self._answer(), Path(self._folder.name))
        return self._current

    def run(self, *arguments: object, **options: Any) -> Done:
        """Start a program and wait for its end; the same arguments as `start`."""
        return self.start(*arguments, **options).end()

    def ended(self, seconds: float) -> bool:
        """Whether the program ends within these seconds."""
        if self._result is None and select.select([self._process.stdout], [], [], seconds)[0]:
            self.result()
        return self._result is not None

    def result(self) -> tuple[int, bool]:
        """Wait for the end: the status, and whether it took too long."""
        if self._result is None:
            self._result = tuple(self._answer())
        return self._result

    def clear(self) -> None:
        """Kill what still runs."""
        if self._current is not None and not self.ended(0.0):
            os.kill(self._current.pid, signal.SIGKILL)
            self.result()
        self._current = None

    def close(self) -> None:
        """End the server."""
        self.clear()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server itself ended")
        return json.loads(line)


@cache
def server() -> Server:
    """The server of this test process, started when it is first needed."""
    found = Server()
    atexit.register(found.close)
    return found


def command_of(module: str) -> list[str]:
    """How to start `serve()` of a module of the tests, which are not importable after that."""
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from {module} import serve; "
    return [sys.executable, "-c", f"{code}sys.path.remove({str(TESTS)!r}); serve()"]


def script(file: Path) -> str:
    """The program that is a script's file."""
    run = f"runpy.run_path({str(file)!r}, run_name='__main__')"
    return f"import runpy, sys\nsys.argv[0] = {str(file)!r}\n{run}\n"


def import_everything() -> None:
    """Imports, and what libraries work out once and keep; nothing that starts a thread."""
    for name in MODULES:
        import_module(f"peftcli.{name}")
    import torch

    from peftcli.models import Device, load_base
    from peftcli.recipe.schema import Model
    from peftcli.train.plot import plot_losses

    torch.set_num_threads(1)
    load_base(Model(name="bundled:tiny"), Device("cpu", "float32", "CPU", None))
    with tempfile.TemporaryDirectory() as folder:
        plot_losses(Path(folder) / "loss.png", [(1, 1.0)], [])
    gc.collect()
    gc.freeze()


def default_signals() -> None:
    """Both are ignored where the tests run in a background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def end_with(program: Callable[[], object]) -> NoReturn:
    """Run a program and end the process as the interpreter would."""
    code: object = 1
    try:
        program()
        code = None
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def serve() -> None:
    """The server: for each order, one line with the process and one with how it ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    import_everything()
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            end_with(partial(_run, order))
        print(json.dumps(child), file=answers, flush=True)
        print(json.dumps(_wait(child, order["seconds"])), file=answers, flush=True)


def _prepare(order: dict[str, Any]) -> None:
    folder, terminal = Path(order["folder"]), order["terminal"]
    os.setsid()
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, folder / "out", write),
        (2, folder / "err", write),
    ):
        descriptor = os.open(terminal or path, os.O_RDWR if terminal else flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    default_signals()


def _run(order: dict[str, Any]) -> None:
    _prepare(order)
    if order["program"] is None:
        sys.argv = ["peftcli", *order["arguments"]]
        from peftcli.cli import main

        main()
    else:
        sys.argv = ["-c", *order["arguments"]]
        exec(compile(order["program"], "<string>", "exec"), {"__name__": "__main__"})


def _wait(child: int, seconds: float) -> tuple[int, bool]:
    """The status of the child, and whether it was killed because it took too long."""
    until, late = time.monotonic() + seconds, False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status, late
        if not late and time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            late = True
        time.sleep(0.002)
