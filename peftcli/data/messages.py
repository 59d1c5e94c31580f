"""Chat messages: any usual spelling of a turn -> one strict form that templates can render."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
# Nearly all messages look like this, and need no further reading.
PLAIN = {"role", "content"}
SPEAKERS = ("user", "assistant", "system")
# Keys that templates read beside role, content and tool_calls.
KEPT = ("name", "tool_call_id", "weight")
REASONING = ("reasoning_content", "thinking", "reasoning")


class RowError(Exception):
    """What is wrong with one row; the text names the field and what was found."""


def found(value: object) -> str:
    """A value as a message shows it: its kind, and its beginning when that is short."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {value[:30]!r}" if value.strip() else "an empty text"
    kind = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "a map"}
    name = kind.get(type(value), type(value).__name__)
    return name if isinstance(value, list | dict) else f"{name} ({value})"


def read_messages(value: object, field: str = "messages") -> list[Message]:
    """A conversation that has an assistant turn; raises RowError naming the message at fault."""
    messages = read_turns(value, field)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"'{field}' has no assistant message, so nothing in it can be trained on")
    return messages


def read_turns(value: object, field: str) -> list[Message]:
    """A list of messages in the strict form, whoever speaks."""
    if not isinstance(value, list):
        raise RowError(f"'{field}' is {found(value)}, expected a list of messages")
    if not value:
        raise RowError(f"'{field}' is an empty list")
    return [_message(item, field, index) for index, item in enumerate(value)]


def read_tools(value: object, field: str = "tools") -> list[dict[str, Any]] | None:
    """Tool descriptions as a list in the OpenAI form, or None; JSON text is read."""
    if isinstance(value, str):
        value = _parse(value, field) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"'{field}' is {found(value)}, expected a list of tool descriptions")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in value
    ]


def _message(raw: object, field: str, index: int) -> Message:
    if isinstance(raw, dict) and raw.keys() == PLAIN and raw["role"] in SPEAKERS:
        content = raw["content"]
        if isinstance(content, str) and (raw["role"] != "assistant" or content.strip()):
            return raw
    at = f"{field}[{index}]"
    if not isinstance(raw, dict):
        raise RowError(f"'{at}' is {found(raw)}, expected a map with role and content")
    role = _role(raw, at)
    content = raw.get("content", raw.get("value"))
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(content, at)]}
    message: Message = {"role": role, "content": _content(content, at)}
    if role == "assistant":
        calls = _calls(raw, at)
        if calls:
            message["tool_calls"] = calls
        elif content is not None and not message["content"].strip():
            raise RowError(f"'{at}' is an assistant message without content or tool_calls")
    if content is None and "tool_calls" not in message:
        raise RowError(f"'{at}' ({role}) has no content (null or missing)")
    for key in KEPT:
        if raw.get(key) is not None:
            message[key] = raw[key]
    reasoning = next((raw[key] for key in REASONING if isinstance(raw.get(key), str)), None)
    if reasoning is not None:
        # Templates read it under one of two names.
        message["reasoning_content"] = message["thinking"] = reasoning
    return message


def _role(raw: Message, at: str) -> str:
    name = raw.get("role", raw.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        described = "no role" if name is None else f"the role {name!r}"
        raise RowError(f"'{at}' has {described}; accepted: {', '.join(ROLES)}")
    return role


def _content(content: object, at: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, at) for part in content)
    raise RowError(f"the content of '{at}' is {found(content)}, expected text")


def _part(part: object, at: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else found(part)
    raise RowError(f"the content of '{at}' holds a part of kind {kind!r}; only text can be trained")


def _calls(raw: Message, at: str) -> list[dict[str, Any]]:
    calls = raw.get("tool_calls")
    if calls is None:
        legacy = raw.get("function_call")
        return [] if legacy is None else [_call(legacy, f"{at}.function_call")]
    if not isinstance(calls, list):
        raise RowError(f"'{at}.tool_calls' is {found(calls)}, expected a list")
    return [_call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _call(call: object, at: str) -> dict[str, Any]:
    """One tool call with its arguments as a map, which is what templates expect."""
    if isinstance(call, str):
        call = _parse(call, at)
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowError(f"'{at}' is {found(inner)}, expected a tool call with name and arguments")
    arguments = inner.get("arguments", {})
    for _ in range(2):  # some sets encode the arguments as JSON twice
        if isinstance(arguments, str):
            arguments = _parse(arguments, f"{at}.arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowError(f"'{at}.arguments' is {found(arguments)}, expected a map")
    result = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result


def _parse(text: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"'{at}' is not JSON: {str(error)[:80]}") from None
