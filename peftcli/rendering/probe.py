"""What a chat template writes around an answer, learned by rendering small conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.errors import ArtefactError
from peftcli.rendering.marks import CLOSE, OPEN
from peftcli.rendering.template import ChatTemplate, RenderError

Message = Mapping[str, Any]

# Capital letters and full stops survive trimming; no template writes such words itself.
FIRST, SECOND = "Zeroth question?", "Another question?"
ANSWER, REPLY = "Yardstick answer.", "Quixotic reply."
TOOL, RESULT = "lookup_zebra", "Striped result."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Looks up.",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
    }
]


@dataclass(frozen=True)
class Turns:
    """How a template opens and closes the turns of the assistant."""

    openings: tuple[str, ...]
    """Text right before what the model writes; empty when nothing distinctive stands there."""
    closings: tuple[str, ...]
    """Tokens that end a turn in any place; the first one ends the last answer."""
    stops: tuple[str, ...]
    """The closings that end a generation: after an answer, and after a tool call."""
    ending: str
    """All that follows the last answer, when that is written word for word after the prompt."""
    tagged: bool
    """Whether the template marks trained text itself with `{% generation %}`."""
    calls: bool
    """Whether tool calls are written."""
    text_arguments: bool
    """Whether the arguments of a tool call must be JSON text instead of a map."""


def probe(template: ChatTemplate, added: Sequence[str]) -> Turns:
    """Learn the turns of `template`; `added` are the tokenizer's control and added tokens.

    Raises ArtefactError when the template cannot be trained with: no answer in its text, a
    doubled begin token, or no single token that ends an answer.
    """
    name = template.source.origin
    try:
        text, tagged = _clean(template.render(_turns(FIRST, ANSWER)))
        double, _ = _clean(template.render(_turns(FIRST, ANSWER, SECOND, REPLY)))
        asked, _ = _clean(template.render(_turns(FIRST), prompt=True))
        unasked, _ = _clean(template.render(_turns(FIRST)))
    except RenderError as error:
        raise ArtefactError(f"the chat template ({name}) fails: {error}", OTHER) from None
    if text.count(ANSWER) != 1 or FIRST not in text:
        raise ArtefactError(f"the chat template ({name}) does not write its messages", OTHER)
    bos = template.source.special.get("bos_token", "")
    if bos and text.startswith(bos * 2):
        raise ArtefactError(f"the chat template ({name}) writes {bos} twice", OTHER)
    tokens = re.compile(
        "|".join(re.escape(token) for token in sorted(added, key=len)[::-1]) or "$^"
    )
    last, inner = _closings(text.partition(ANSWER)[2], double, tokens, name)
    calls = _Calls.learn(template, tokens)
    openings = [
        _opening(text, asked, FIRST, ANSWER, unasked).removeprefix(last).lstrip(),
        _opening(double.partition(SECOND)[0], asked, FIRST, ANSWER, unasked).removeprefix(last),
        calls.opening,
    ]
    # What a prompt says for the model, such as <think>, is not said before an answer without it.
    openings += [part.partition("<think>")[0] for part in openings[:2] if "<think>" in part]
    usable = len(openings[0].strip()) > 2
    openings = [part.lstrip() for part in openings if len(part.strip()) > 2]
    return Turns(
        tuple(dict.fromkeys(openings)) if usable else (),
        tuple(dict.fromkeys(part for part in (last, inner, calls.closing) if part)),
        tuple(dict.fromkeys(part for part in (last, calls.closing) if part)),
        text.removeprefix(asked + ANSWER) if text.startswith(asked + ANSWER) else "",
        tagged,
        calls.written,
        calls.text_arguments,
    )


OTHER = "name another with `data.chat_template`: `plain`, `chatml` or a .jinja file"


def _turns(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def _clean(text: str) -> tuple[str, bool]:
    return text.replace(OPEN, "").replace(CLOSE, ""), OPEN in text


def _closings(tail: str, double: str, tokens: re.Pattern[str], name: str) -> tuple[str, str]:
    """What ends the last answer, and what ends one that a question follows, if that differs."""
    first = tokens.search(tail)
    if first is None:
        shown = repr(tail) if tail else "nothing"
        raise ArtefactError(
            f"the chat template ({name}) writes {shown} after an answer, which holds no single "
            "token of this tokenizer; the model would never learn to stop",
            "end the assistant turn with {{ eos_token }} in the template, or write "
            "`data.chat_template: plain`",
        )
    gap = double.partition(ANSWER)[2].partition(SECOND)[0]
    shared = _shared(tail, gap)
    whole = [token for token in tokens.finditer(tail) if token.end() <= len(shared)]
    if whole:
        return tail[whole[0].start() : whole[-1].end()], ""
    # The header of the question may stand in the gap too: it holds the last token or tokens.
    inside = tokens.findall(gap)
    return first.group(), inside[0] if len(inside) > 1 else ""


def _shared(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _opening(text: str, ask: str, before: str, answer: str, unasked: str) -> str:
    """The text that stands before an answer and in a prompt alike, without what ends `before`."""
    written = text.rpartition(answer)[0].rpartition(before)[2]
    asked = ask.rpartition(before)[2]
    shared = _shared(written, asked)
    ending = unasked.rpartition(before)[2]
    if asked.startswith(ending) and len(ending) < len(shared):
        return shared[len(ending) :]
    return shared


@dataclass(frozen=True)
class _Calls:
    """What a template does with tool calls."""

    written: bool
    opening: str = ""
    closing: str = ""
    text_arguments: bool = False

    @classmethod
    def learn(cls, template: ChatTemplate, tokens: re.Pattern[str]) -> _Calls:
        for as_text in (False, True):
            arguments: Any = {"q": "stripes"}
            call = {"name": TOOL, "arguments": json.dumps(arguments) if as_text else arguments}
            asked = [
                *_turns(FIRST),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": call}],
                },
            ]
            result = {"role": "tool", "name": TOOL, "tool_call_id": "abcdefghi", "content": RESULT}
            answered = [*asked, result, {"role": "assistant", "content": ANSWER}]
            try:
                first, _ = _clean(template.render(asked, TOOLS))
                whole, _ = _clean(template.render(answered, TOOLS))
                ask, _ = _clean(template.render(answered[:-1], TOOLS, prompt=True))
                unasked, _ = _clean(template.render(answered[:-1], TOOLS))
            except RenderError:
                continue
            tail = first.rpartition(FIRST)[2]
            if TOOL not in tail or RESULT not in whole:
                continue
            ends = tokens.findall(tail.rpartition(TOOL)[2])
            opening = _opening(whole, ask, RESULT, ANSWER, unasked)
            return cls(True, opening, ends[-1] if ends else "", as_text)
        return cls(False)
