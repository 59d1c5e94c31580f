"""Chat templates, run in a sandbox that bounds their time and the text they make.

Written for worker processes: it imports neither torch nor transformers, and renders the same text
as `tokenizer.apply_chat_template` except that templates which ask for today's date are given a
fixed one, so that the same rows make the same tokens tomorrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError  # noqa: TID253 - this file is heavy
from jinja2.exceptions import SecurityError  # noqa: TID253

from peftcli.errors import ArtefactError
from peftcli.rendering.budget import Budget, TooMuch
from peftcli.rendering.compiling import Generation
from peftcli.rendering.sandbox import Sandbox

MAX_TEXT = 64 << 20
MAX_TEMPLATE = 1 << 20


class RenderError(Exception):
    """A template refused a conversation; the text is the template's own reason."""


@dataclass(frozen=True)
class TemplateSource:
    """A template with the special tokens it may write; plain data, so workers can have it."""

    text: str
    origin: str
    special: Mapping[str, str] = field(default_factory=dict)


class ChatTemplate:
    """A compiled template; `render` makes the text of one conversation."""

    def __init__(self, source: TemplateSource) -> None:
        self.source = source
        if len(source.text) > MAX_TEMPLATE:
            raise ArtefactError(
                f"the chat template ({source.origin}) has {len(source.text):,} characters, above "
                f"{MAX_TEMPLATE:,}",
                "name another with `data.chat_template`",
            )
        self.environment = Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
        )
        try:
            self.compiled = self.environment.from_string(source.text)
        except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise ArtefactError(
                f"the chat template ({source.origin}) does not compile: {_reason(error)}",
                "name another with `data.chat_template`",
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """The text of a conversation, `prompt` with the header of the next answer.

        Raises RenderError when the template refuses it, and ArtefactError when the template
        tries to escape, runs too long or writes too much.
        """
        values = {
            **self.source.special,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        self.environment.budget = Budget()
        try:
            return self._text(values)
        except (SecurityError, TooMuch) as error:
            raise ArtefactError(
                f"the chat template ({self.source.origin}) was stopped: {error}",
                "do not trust it; `data.chat_template: plain` names another",
            ) from None
        except RecursionError:
            raise RenderError("the template nests too deeply") from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RenderError(_reason(error)) from None
        except (ArithmeticError, MemoryError, StopIteration) as error:
            raise RenderError(_reason(error)) from None

    def _text(self, values: Mapping[str, Any]) -> str:
        pieces, size = [], 0
        for piece in self.compiled.root_render_func(self.compiled.new_context(dict(values))):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_TEXT:
                raise TooMuch(f"more than {MAX_TEXT >> 20} million characters of text")
        return "".join(pieces)


def _reason(error: BaseException) -> str:
    return str(error)[:300] or type(error).__name__
