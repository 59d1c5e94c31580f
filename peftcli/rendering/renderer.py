"""Conversations -> text, with the exact places of what is trained on.

The places are found in the text that the template wrote, in one of three ways: the template's own
`{% generation %}` tags; what it writes around an answer (`template_probe`); or, where messages
themselves hold such text or the template rewrites its history, marks put into the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from peftcli.rendering.marks import (
    CLOSE,
    MARK,
    OPEN,
    Message,
    Span,
    any_of,
    apart,
    holds,
    mark,
    sendable,
    tagged,
)
from peftcli.rendering.probe import Turns
from peftcli.rendering.template import ChatTemplate, RenderError, TemplateSource

UNKNOWN = "the chat template rewrites the row, so its answers cannot be found in the text"


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row and the parts of it that are trained on, as character positions."""

    text: str
    spans: list[Span]
    controls: int = 0
    """Control tokens that were typed inside the messages."""
    lost: bool = False
    """Whether the template left out a part of the last answer."""


class Renderer:
    """Renders rows with one template; `train_on` is answers, last or all."""

    def __init__(
        self, source: TemplateSource, turns: Turns, added: Sequence[str], train_on: str
    ) -> None:
        self.template = ChatTemplate(source)
        self.turns = turns
        self.train_on = train_on
        self.opening = any_of(turns.openings)
        self.closing = any_of(turns.closings)
        self.control = any_of([*added, *turns.openings, OPEN, CLOSE, MARK])

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """Render one row; RenderError when the template refuses it or answers are not found."""
        if not self.turns.calls and (tools or any("tool_calls" in item for item in messages)):
            raise RenderError("the chat template does not write tools and tool calls")
        # No token holds a NUL, so this finds tokens inside one message only.
        controls = len(self.control.findall("\0".join([item["content"] for item in messages])))
        sent = [sendable(message, self.turns.text_arguments) for message in messages]
        text, spans = self.template.render(sent, tools), list[Span]()
        if self.turns.tagged:
            text, spans = tagged(text)
        if self.train_on == "all":
            return Rendered(text, [(0, len(text))], controls)
        answers = [place for place, item in enumerate(sent) if item["role"] == "assistant"]
        weights = [message.get("weight", 1) for message in messages]
        chosen = [place for place in answers if weights[place]]
        chosen = [place for place in chosen if self.train_on != "last" or place == answers[-1]]
        if self.turns.tagged and (chosen == answers or len(spans) == len(answers)):
            spans = [self._closed(text, span) for span in spans]
        else:
            spans = self._spans(text, sent, tools, answers, controls)
        if len(chosen) < len(answers):
            pairs = zip(spans, answers, strict=True)
            spans = [span for span, place in pairs if place in chosen]
        lost = sent[answers[-1]]["content"].strip() not in text if answers else False
        return Rendered(text, spans, controls, lost)

    def _spans(
        self,
        text: str,
        sent: Sequence[Message],
        tools: Sequence[Any] | None,
        answers: Sequence[int],
        controls: int,
    ) -> list[Span]:
        if not self.turns.openings:
            spans = self._verbatim(text, [sent[place] for place in answers])
            if spans and not controls and self.turns.ending:
                return spans
            return [self._after_prompt(text, sent, tools, place) for place in answers]
        if not controls:
            starts = [match.end() for match in self.opening.finditer(text)]
            if len(starts) == len(answers):
                spans = [self._to_closing(text, start, start) for start in starts]
                parts = [text[start:end] for start, end in spans]
                turns = [sent[place] for place in answers]
                if apart(spans) and all(map(holds, parts, turns)):
                    return spans
        return self._marked(text, sent, tools, answers)

    def _verbatim(self, text: str, answers: Sequence[Message]) -> list[Span]:
        """Answers stand word for word before the closing tokens; empty when one does not."""
        ends = list(self.closing.finditer(text))
        if len(ends) != len(answers):
            return []
        spans = []
        for end, answer in zip(ends, answers, strict=True):
            start = end.start() - len(answer["content"])
            if not text.startswith(answer["content"], start) or "tool_calls" in answer:
                return []
            spans.append((start, end.end()))
        return spans

    def _after_prompt(
        self, text: str, sent: Sequence[Message], tools: Sequence[Any] | None, place: int
    ) -> Span:
        """The answer follows the rendered prompt, word for word."""
        prompt = self.template.render(sent[:place], tools, prompt=True)
        content = sent[place]["content"].strip()
        written = text.find(content, len(prompt))
        if not text.startswith(prompt) or written < 0:
            raise RenderError(UNKNOWN)
        return self._to_closing(text, len(prompt), written + len(content))

    def _marked(
        self,
        text: str,
        sent: Sequence[Message],
        tools: Sequence[Any] | None,
        answers: Sequence[int],
    ) -> list[Span]:
        """Places found by marks at both ends of the answers, or where each turn before one ends.

        The second way is for templates that rewrite how an answer starts.
        """
        both = [mark(item, True) if item["role"] == "assistant" else item for item in sent]
        places = self._places(text, both, tools)
        if len(places) == 2 * len(answers):
            pairs = zip(places[::2], places[1::2], strict=True)
            spans = [self._to_closing(text, self._opened(text, a), b) for a, b in pairs]
            if apart(spans):
                return spans
        ending = sorted({*answers, *(place - 1 for place in answers if place)})
        ends = [mark(item, False) if i in ending else item for i, item in enumerate(sent)]
        places = self._places(text, ends, tools)
        if len(places) != len(ending):
            raise RenderError(UNKNOWN)
        known, spans = dict(zip(ending, places, strict=True)), []
        for place in answers:
            start = self.opening.search(text, known.get(place - 1, 0))
            if start is None or start.end() > known[place]:
                raise RenderError(UNKNOWN)
            spans.append(self._to_closing(text, start.end(), known[place]))
        return spans

    def _places(
        self, text: str, marked: Sequence[Message], tools: Sequence[Any] | None
    ) -> list[int]:
        """Where the marks of `marked` stand in `text`; none when they changed the text."""
        try:
            pieces = self.template.render(marked, tools).split(MARK)
        except RenderError:
            return []
        if "".join(pieces) != text:
            return []
        return list(accumulate(len(piece) for piece in pieces[:-1]))

    def _opened(self, text: str, position: int) -> int:
        """Where the turn that is written at `position` starts."""
        # A prompt may already hold the first word of the answer, such as <think>.
        starts = [
            (text.rfind(opening, 0, position + len(opening) - 1), len(opening))
            for opening in self.turns.openings
        ]
        start, length = max(starts)
        if start < 0:
            raise RenderError(UNKNOWN)
        return start + length

    def _to_closing(self, text: str, start: int, position: int) -> Span:
        end = self.closing.search(text, max(start, position))
        if end is None:
            raise RenderError("the chat template does not close an answer of this row")
        return start, end.end()

    def _closed(self, text: str, span: Span) -> Span:
        """Tags that leave out the closing token would make a model that never stops."""
        body = text[span[0] : span[1]].rstrip()
        if any(body.endswith(closing) for closing in self.turns.closings):
            return span[0], span[0] + len(body)
        following = self.closing.match(text, span[1])
        return (span[0], following.end()) if following else span
