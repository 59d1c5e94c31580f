"""Real runs in forked processes, with a fault at an exact place or moment.

One process imports everything once and is forked for each run, so that a run of a tiny model costs
a second. With `shim.c` preloaded, the N-th I/O operation below a folder fails, kills or signals.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from forked import ENVIRONMENT, command_of, default_signals, end_with, import_everything

ACTIONS = {
    name: number
    for number, name in enumerate(
        ("none", "fail", "fail on", "kill", "tear", "terminate", "clock back")
    )
}


@dataclass(frozen=True)
class Fault:
    """What happens at the I/O operation `number`; `fail on` is a disk that stays full."""

    action: str = "none"
    number: int = 0
    error: int = 0


@dataclass(frozen=True)
class Send:
    """A signal, `after` seconds from the start or from when `seen` stands in the output."""

    signal: int
    after: float = 0.0
    seen: str = ""
    again: float | None = None
    """Seconds until the same signal is sent once more."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `signal` is what killed it."""

    code: int | None
    signal: int | None
    operations: int
    seconds: float
    stopped_after: float | None
    """Seconds from the first signal that was sent to the end."""
    output: str = field(repr=False)
    errors: str = field(repr=False)


class Lab:
    """A process with everything imported that runs `peftcli` in forks of itself."""

    def __init__(self, folder: Path, shim: Path | None) -> None:
        self.folder = folder
        self.counts = shim is not None
        environment = os.environ | ENVIRONMENT | {"PEFTCLI_CACHE": str(folder / "cache")}
        if shim is not None:
            environment["LD_PRELOAD"] = str(shim)
        self._server = subprocess.Popen(
            command_of("faults.lab"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        *arguments: str,
        cwd: Path,
        fault: Fault | None = None,
        below: Path | None = None,
        send: Send | None = None,
        limits: dict[str, int] | None = None,
        seconds: float = 300.0,
        stdout: str = "",
        meanwhile: tuple[str, Callable[[], object]] | None = None,
        umask: int = 0o022,
    ) -> Outcome:
        """`peftcli ARGUMENTS` in a fork; operations are counted below the folder `below`.

        `meanwhile` is done here as soon as a text stands in the output.
        """
        (self.folder / "log.out").write_text("")
        order = {
            "arguments": list(arguments),
            "cwd": str(cwd),
            "fault": asdict(fault or Fault()),
            "below": str(below.absolute()) if below else "",
            "send": asdict(send) if send else None,
            "limits": limits or {},
            "seconds": seconds,
            "stdout": stdout,
            "umask": umask,
            "log": str(self.folder / "log"),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        if meanwhile is not None:
            self._meanwhile(*meanwhile, seconds)
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the lab itself ended")
        return Outcome(**json.loads(line))

    def _meanwhile(self, seen: str, act: Callable[[], object], seconds: float) -> None:
        output, until = self.folder / "log.out", time.monotonic() + seconds
        while seen not in (output.read_text(errors="replace") if output.exists() else ""):
            if time.monotonic() > until:
                raise RuntimeError(f"{seen} was never seen")
            time.sleep(0.002)
        act()

    def close(self) -> None:
        """End the process."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)


@contextmanager
def opened(folder: Path, *, shim: bool = True) -> Iterator[Lab]:
    """A lab, with the shim if there is a C compiler."""
    lab = Lab(folder, build_shim(folder) if shim else None)
    try:
        yield lab
    finally:
        lab.close()


def build_shim(folder: Path) -> Path | None:
    """Compile shim.c; None without a C compiler or outside Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def serve() -> None:
    """Do what is ordered, line by line, until there is no more."""
    import ctypes

    import_everything()
    own = ctypes.CDLL(None)
    counter = None
    if hasattr(own, "fault_counter"):
        own.fault_counter.restype = ctypes.POINTER(ctypes.c_long)
        own.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
        counter = own.fault_counter()
    for line in sys.stdin:
        order = json.loads(line)
        if counter is not None:
            counter[0] = 0
        log = Path(order["log"])
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            end_with(partial(_child, order, own, log))
        status, sent = _watch(child, order, log, began)
        ended = time.monotonic()
        outcome = Outcome(
            code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            operations=counter[0] if counter is not None else 0,
            seconds=ended - began,
            stopped_after=ended - sent if sent is not None else None,
            output=log.with_suffix(".out").read_text(errors="replace"),
            errors=log.with_suffix(".err").read_text(errors="replace"),
        )
        print(json.dumps(asdict(outcome)), flush=True)


def _child(order: dict[str, Any], own: Any, log: Path) -> None:
    for stream, number in ((".out", 1), (".err", 2)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        path = order["stdout"] if number == 1 else ""
        descriptor = os.open(path or log.with_suffix(stream), flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.setsid()
    os.umask(order["umask"])
    os.chdir(order["cwd"])
    default_signals()
    _limit(order["limits"])
    fault = order["fault"]
    if order["below"] and hasattr(own, "fault_arm"):
        own.fault_arm(
            order["below"].encode(), ACTIONS[fault["action"]], fault["number"], fault["error"]
        )
    sys.argv = ["peftcli", *order["arguments"]]
    from peftcli.cli import main

    main()


def _limit(limits: dict[str, int]) -> None:
    import resource

    for name, size in limits.items():
        if name == "AS":  # on top of what the imports took
            size += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (size, size))


def _watch(child: int, order: dict[str, Any], log: Path, began: float) -> tuple[int, float | None]:
    """Wait for the child, send what was ordered; its status and when the first signal went."""
    send, sent, seen_at, again = order["send"], None, None, False
    if send and not send["seen"]:
        seen_at = began
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status, sent
        now = time.monotonic()
        if send and seen_at is None:
            output = log.with_suffix(".out")
            if output.exists() and send["seen"] in output.read_text(errors="replace"):
                seen_at = now
        if send and sent is None and seen_at is not None and now >= seen_at + send["after"]:
            os.kill(child, send["signal"])
            sent = now
        wanted = sent is not None and send["again"] is not None and not again
        if wanted and now >= sent + send["again"]:
            os.kill(child, send["signal"])
            again = True
        if now > began + order["seconds"]:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
