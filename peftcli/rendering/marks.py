"""Messages as templates get them, plain or with marks, and places in the text they make."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

# Unicode noncharacters: they occur in no text, so they can mark places in it.
OPEN, CLOSE, MARK = "\ufdd0", "\ufdd1", "\ufdd2"
Message = Mapping[str, Any]
Span = tuple[int, int]


def any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len)[::-1]) or "(?!)")


def sendable(message: Message, text_arguments: bool) -> Message:
    """The message as templates know it: without our weight, arguments as they want them."""
    if "weight" not in message and not text_arguments:
        return message
    sent = dict(message)
    sent.pop("weight", None)
    if text_arguments and "tool_calls" in sent:
        sent["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _as_text(call)}}
            for call in sent["tool_calls"]
        ]
    return sent


def _as_text(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"]["arguments"], ensure_ascii=False)


def _names(message: Message) -> list[str]:
    return [call["function"]["name"] for call in message.get("tool_calls", ())]


def holds(segment: str, message: Message) -> bool:
    return message["content"].strip() in segment and all(
        name in segment for name in _names(message)
    )


def apart(spans: Sequence[Span]) -> bool:
    return all(before[1] <= after[0] for before, after in pairwise(spans))


def tagged(text: str) -> tuple[str, list[Span]]:
    """The text without tags, and where the tags stood."""
    pieces = re.split(f"[{OPEN}{CLOSE}]", text)
    spans, position = [], 0
    for index, piece in enumerate(pieces):
        if index % 2:
            spans.append((position, position + len(piece)))
        position += len(piece)
    return "".join(pieces), spans


def mark(message: Message, both: bool) -> dict[str, Any]:
    """The message with a mark at the last, or the first and last, place that must be written."""
    content = message["content"]
    body = content.strip()
    calls = [dict(call) for call in message.get("tool_calls", ())]
    marks = [0, len(body)] if both else [len(body)]
    if calls:
        marks = [0] if both and body else []
        if both and not body:
            calls[0] = _renamed(calls[0], MARK + calls[0]["function"]["name"])
        calls[-1] = _renamed(calls[-1], calls[-1]["function"]["name"] + MARK)
    for place in reversed(marks):
        body = body[:place] + MARK + body[place:]
    lead, _, trail = content.partition(content.strip()) if content.strip() else ("", "", content)
    marked = dict(message) | {"content": lead + body + trail}
    return marked | {"tool_calls": calls} if calls else marked


def _renamed(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "name": name}}
