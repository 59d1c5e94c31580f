"""Jinja's sandbox for chat templates, with limits on time, loops and repeated text."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import nodes  # noqa: TID253 - this file is heavy
from jinja2.exceptions import SecurityError, TemplateRuntimeError  # noqa: TID253
from jinja2.ext import Extension  # noqa: TID253
from jinja2.filters import do_indent  # noqa: TID253
from jinja2.parser import Parser  # noqa: TID253
from jinja2.runtime import Macro  # noqa: TID253
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: TID253
from jinja2.utils import Namespace  # noqa: TID253

CPU_SECONDS = 60.0
MAX_STEPS = 1_000_000
WIDE = re.compile(r"\d{5}|\*")
# Of no use to a chat template, and a way to fill the memory or to differ from run to run.
UNUSED = ("lipsum", "cycler", "joiner", "batch", "slice", "random")
# The date Llama 3 itself falls back to.
DATE = datetime(2024, 7, 26)
# Unicode noncharacters: they occur in no text, so they can mark places in it.
OPEN, CLOSE, MARK = "\ufdd0", "\ufdd1", "\ufdd2"


class TooMuch(Exception):
    """A template ran too long or makes too much."""


class Generation(Extension):
    """`{% generation %}`: its text is put between OPEN and CLOSE, so that its place is known."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("mark"), [], [], body)
        return block.set_lineno(line)

    def mark(self, caller: Macro) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also counts loop steps and bounds repeated and padded text."""

    intercepted_binops = frozenset(["*", "**", "%"])
    steps = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = _to_json
        self.filters["center"] = _center
        self.filters["format"] = _format
        self.filters["indent"] = _indent
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": DATE.strftime,
            "range": self._range,
            "dict": _new_dict,
            "namespace": _Namespace,
        }
        for name in UNUSED:
            self.globals.pop(name, None)
            self.filters.pop(name, None)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, int) and abs(arg) > MAX_STEPS for arg in args):
            raise TooMuch("it pads text")
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _narrow(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        pair = (left, right)
        if operator == "%" and isinstance(left, str):
            _narrow(left)
        if any(isinstance(side, str | list | tuple) for side in pair):
            size = max(len(side) for side in pair if isinstance(side, str | list | tuple))
            times = max((side for side in pair if isinstance(side, int)), default=1)
            if size * times > MAX_STEPS:
                raise TooMuch("it repeats text too often")
        if operator == "**" and any(abs(side) > 1000 for side in pair):
            raise TooMuch("it raises to a power")
        return super().call_binop(context, operator, left, right)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.steps += len(numbers)
        if self.steps > MAX_STEPS:
            raise TooMuch(f"more than {MAX_STEPS} loop steps")
        return numbers


class _Namespace(Namespace):
    """A namespace without names that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"{name!r} is no name for a template to set")
        super().__setitem__(name, value)


def _new_dict(*args: Any, **entries: Any) -> dict[Any, Any]:
    return dict(*args, **entries)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _narrow(form: str) -> str:
    """A format without a width that would fill the memory."""
    if WIDE.search(form):
        raise TooMuch("it pads text")
    return form


def _format(form: str, *values: Any) -> str:
    return _narrow(form) % values


def _center(text: str, width: int = 80) -> str:
    return text.center(int(_narrow(str(width))))


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    return do_indent(text, int(_narrow(str(width))), first, blank)


def _raise(message: str) -> None:
    raise TemplateRuntimeError(message)


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TooMuch(f"it ran for more than {CPU_SECONDS:g} seconds")


@contextmanager
def time_limit() -> Iterator[None]:
    """Stop templates that run for CPU_SECONDS, which is ample for thousands of rows.

    Signals reach the main thread only, so in other threads only the text and the loops are bounded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
