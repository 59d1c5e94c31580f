"""Jinja's sandbox for chat templates, with limits on loops and all text that is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError, TemplateRuntimeError  # noqa: TID253 - heavy file
from jinja2.filters import do_indent, do_sum, make_attrgetter  # noqa: TID253
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: TID253
from jinja2.utils import Namespace, pass_environment  # noqa: TID253

from peftcli.rendering.budget import MAX_STEPS, Budget, TooMuch, check_operation, weight
from peftcli.rendering.compiling import CountingGenerator

MAX_INDENT = 32
# Of no use to a chat template, and a way to fill the memory or to differ from run to run.
UNUSED = (
    *("lipsum", "cycler", "joiner", "batch", "slice", "random"),
    *("wordwrap", "urlize", "xmlattr", "pprint"),
)
# The date Llama 3 itself falls back to.
DATE = datetime(2024, 7, 26)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also counts loop steps and the size of every text and list."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])
    code_generator_class = CountingGenerator

    def __init__(self, **options: Any) -> None:
        self.budget = Budget()
        super().__init__(finalize=self._shown, **options)
        self.concat = self.joined  # type: ignore[method-assign]
        self.filters = {name: self._counted(function) for name, function in self.filters.items()}
        self.filters |= {
            "tojson": self._to_json,
            "center": self._center,
            "format": self._format,
            "indent": self._indent,
            "replace": self._replace,
            "join": pass_environment(_join),
            "string": lambda value: self.budget.text(value),
            "sum": pass_environment(_sum),
        }
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

    def joined(self, values: Iterable[Any]) -> str:
        """Parts as one text, for `~`, macros and blocks."""
        return self.budget.joined(values)

    def part(self, value: Any, cut: slice) -> Any:
        """A slice of a text or list."""
        return self.budget.kept(value[cut])

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        if any(isinstance(value, int) and abs(value) > MAX_STEPS for value in values):
            raise TooMuch("it pads text")
        owner = getattr(__obj, "__self__", None)
        if not isinstance(owner, str):
            return super().call(__context, __obj, *args, **kwargs)
        method = str(getattr(__obj, "__name__", ""))
        if method == "join" and len(args) == 1:
            return __self.budget.joined(_texts(args[0]), owner)
        __self.budget.called(owner, method, values)
        return __self.budget.kept(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = str(value.__self__)

        def bounded(*args: Any, **kwargs: Any) -> str:
            self.budget.formatted(form, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return bounded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self.budget.formatted(left, [right])
        else:
            self.budget.spend(check_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            return self.budget.kept(function(*args, **kwargs))

        return counted

    def _shown(self, value: Any) -> Any:
        return value if isinstance(value, str) else self.budget.text(value)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.budget.step(len(numbers))
        return numbers

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which models were not trained on.
        wide = indent > MAX_INDENT if isinstance(indent, int) else len(indent or "") > MAX_INDENT
        if wide or weight(separators) > MAX_INDENT * 2:
            raise TooMuch("it pads text")
        self.budget.spend(weight(value))
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        self.budget.spend(len(text))
        return text

    def _format(self, form: str, *values: Any) -> str:
        self.budget.formatted(str(form), values)
        return form % values

    def _center(self, text: str, width: int = 80) -> str:
        self.budget.spend(int(width))
        return text.center(int(width))

    def _indent(self, text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
        self.budget.spend(len(text) + int(width) * (text.count("\n") + 1))
        return do_indent(text, int(width), first, blank)

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        whole, before, after = map(self.budget.text, (text, old, new))
        self.budget.called(whole, "replace", [before, after])
        return whole.replace(before, after, -1 if count is None else count)


class _Namespace(Namespace):
    """A namespace without names that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"{name!r} is no name for a template to set")
        super().__setitem__(name, value)


def _join(
    environment: Sandbox, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return environment.budget.joined(value, str(d))


def _sum(
    environment: Sandbox,
    iterable: Iterable[Any],
    attribute: str | int | None = None,
    start: float = 0,
) -> Any:
    if not isinstance(start, int | float):
        raise TooMuch("it adds up lists")
    return do_sum(environment, iterable, attribute, start)


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """What `str.join` accepts."""
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"sequence item {index}: expected str instance")
        yield value


def _new_dict(*args: Any, **entries: Any) -> dict[Any, Any]:
    return dict(*args, **entries)


def _raise(message: str) -> None:
    raise TemplateRuntimeError(message)
