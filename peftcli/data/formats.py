"""Row formats: one function for each, from a raw row to one canonical row.

A canonical row is `{"messages": [...], "tools"?: [...]}`, `{"prompt": str, "completion": str}` or
`{"text": str}`. A new format is one function and one entry in FORMATS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftcli.data.messages import RowError, found, read_messages, read_tools, read_turns

Row = dict[str, Any]
Labels = Mapping[str, str]
Build = Callable[[Row, Labels], Row]

NO_INPUT = re.compile(r"\s*<\s*no\s?input\s*>\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Format:
    """One row format: the fields it needs, each with the names it is known by."""

    name: str
    build: Build
    fields: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    lists: frozenset[str] = field(default_factory=frozenset)


def _text_of(row: Row, name: str, empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        state = found(value) if name in row else "missing"
        raise RowError(f"'{name}' is {state}, expected text")
    if not empty and not value.strip():
        raise RowError(f"'{name}' is empty")
    return value


def _messages(row: Row, labels: Labels) -> Row:
    if row.get("label") is False:
        raise RowError(
            "'label' is false: preference data marks this answer as a bad one; "
            "write `bad_rows: skip` to leave such rows out"
        )
    if "messages" not in row:
        raise RowError("'messages' is missing")
    result: Row = {"messages": read_messages(row["messages"])}
    tools = read_tools(row.get("tools") or row.get("functions"))
    return result | {"tools": tools} if tools else result


def _sharegpt(row: Row, labels: Labels) -> Row:
    if "conversations" not in row:
        raise RowError("'conversations' is missing")
    turns = row["conversations"]
    if isinstance(turns, list) and isinstance(row.get("answer"), dict):
        turns = [*turns, row["answer"]]
    messages = read_messages(turns, "conversations")
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    tools = read_tools(row.get("tools"))
    return {"messages": messages} | ({"tools": tools} if tools else {})


def _alpaca(row: Row, labels: Labels) -> Row:
    prompt, answer = _text_of(row, "instruction"), _text_of(row, "output")
    extra = _text_of(row, "input", empty=True) if row.get("input") is not None else ""
    if extra.strip() and not NO_INPUT.fullmatch(extra):
        prompt = f"{prompt}\n\n{extra}"
    system, history = row.get("system"), row.get("history") or []
    if not history and not system:
        return {"prompt": prompt, "completion": answer}
    messages = [{"role": "system", "content": _text_of(row, "system")}] if system else []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise RowError(f"'history[{index}]' is {found(pair)}, expected [question, answer]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages + turn}


def _prompt_completion(row: Row, labels: Labels) -> Row:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        prompt, completion = _text_of(row, "prompt", empty=True), _text_of(row, "completion")
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, list):
        before = read_turns(prompt, "prompt")
    else:
        before = [{"role": "user", "content": _text_of(row, "prompt")}]
    if isinstance(completion, list):
        after = read_messages(completion, "completion")
    else:
        after = [{"role": "assistant", "content": _text_of(row, "completion")}]
    tools = read_tools(row.get("tools"))
    messages = [_untrained(message) for message in before] + after
    return {"messages": messages} | ({"tools": tools} if tools else {})


def _untrained(message: Row) -> Row:
    return message | {"weight": 0} if message["role"] == "assistant" else message


def _question_answer(row: Row, labels: Labels) -> Row:
    return {"prompt": _text_of(row, "question"), "completion": _text_of(row, "answer")}


def _classification(row: Row, labels: Labels) -> Row:
    text, value = _text_of(row, "text"), row.get("label")
    if isinstance(value, bool):
        value = str(value).lower()
    key = str(value).strip() if isinstance(value, str | int) else ""
    if not key:
        raise RowError(f"'label' is {found(value)}, expected a label")
    if labels:
        if key not in labels:
            raise RowError(f"'label' is {key!r}, which `labels` does not name")
        return {"prompt": text, "completion": labels[key]}
    if key.lstrip("-").isdecimal():
        raise RowError(
            f"'label' is the number {key}, not a name; write `labels: [first name, second name]` "
            "so that the model learns words"
        )
    return {"prompt": text, "completion": key}


def _text(row: Row, labels: Labels) -> Row:
    return {"text": _text_of(row, "text")}


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "messages",
            _messages,
            {"messages": ("messages",)},
            ("tools", "functions", "label"),
            frozenset({"messages"}),
        ),
        Format(
            "sharegpt",
            _sharegpt,
            {"conversations": ("conversations", "conversation")},
            ("tools", "system", "answer"),
            frozenset({"conversations"}),
        ),
        Format(
            "alpaca",
            _alpaca,
            {"instruction": ("instruction",), "output": ("output",)},
            ("input", "history", "system"),
        ),
        Format(
            "prompt_completion",
            _prompt_completion,
            {"prompt": ("prompt",), "completion": ("completion",)},
            ("tools",),
        ),
        Format(
            "question_answer",
            _question_answer,
            {"question": ("question",), "answer": ("answer",)},
        ),
        Format(
            "classification",
            _classification,
            {"text": ("text", "sentence"), "label": ("label", "category")},
        ),
        Format("text", _text, {"text": ("text",)}),
    )
}


def reader(name: str, columns: Mapping[str, str], labels: Labels) -> Callable[[Row], Row]:
    """The function that turns a raw row of format `name` into a canonical row or a RowError.

    `columns` maps a field of the format to the column that holds it (see `detect`).
    """
    entry = FORMATS[name]
    renames = [(field, column) for field, column in columns.items() if field != column]
    if not renames:
        return lambda row: entry.build(row, labels)

    def read(row: Row) -> Row:
        renamed = dict(row)
        for canonical, column in renames:
            if column in row:
                renamed[canonical] = row[column]
            elif canonical in entry.fields:
                raise RowError(f"'{column}' is missing")
        return entry.build(renamed, labels)

    return read


def label_names(labels: Mapping[str, str] | Sequence[str] | None) -> Labels:
    """Labels by position or by value -> value as text -> name."""
    if labels is None:
        return {}
    if isinstance(labels, Mapping):
        return {str(value): name for value, name in labels.items()}
    return {str(position): name for position, name in enumerate(labels)}
