"""An Ollama Modelfile whose template writes exactly what the tokenizer's chat template writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftcli.errors import ArtefactError

FILE = "Modelfile"
Message = dict[str, str]
SYSTEM, USER, ANSWER = "Zsys0", "Zusr0", "Zans0"  # words that no template writes by itself
SPEECHES = {
    "no system": ("user",),
    "two turns": ("user", "assistant", "user"),
    "system": ("system", "user"),
    "all": ("system", "user", "assistant", "user", "assistant", "user"),
}


@dataclass(frozen=True)
class Pieces:
    """The text around each message."""

    start: str
    """Before the first message, where there is no system message."""
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    """What stands where the answer is to begin."""

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama will write, up to where the answer begins."""
        around = {"user": self.user, "assistant": self.assistant}
        if self.system is not None:
            around["system"] = self.system
        text = "" if messages[0]["role"] == "system" else self.start
        for message in messages:
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text + self.prompt


def write_modelfile(folder: Path, stops: Sequence[int]) -> tuple[str, ...]:
    """Write the Modelfile into a merged folder; what could not be said in it, one sentence each.

    Raises ArtefactError when the folder's tokenizer does not load.
    """
    tokenizer = _tokenizer(folder)
    lines, notes = ["FROM ."], []
    if tokenizer.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        pieces = learn_pieces(tokenizer)
        if pieces is None:
            notes.append(
                f"{FILE}: the chat template does more than put text around messages, so TEMPLATE "
                "is left out; Ollama knows the templates of common models, or write it yourself"
            )
        else:
            if pieces.system is None:
                notes.append(f"{FILE}: the chat template takes no system message, nor does this")
            lines.append(f'TEMPLATE """{go_template(pieces)}"""')
    for token in stops:
        text = tokenizer.convert_ids_to_tokens(token)
        if isinstance(text, str) and '"' not in text:
            lines.append(f'PARAMETER stop "{text}"')
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tuple(notes)


def learn_pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
    """The text around messages, if that is all the template writes; checked on four talks."""
    for with_system in (True, False):
        try:
            pieces = _pieces(tokenizer, with_system)
        except (TemplateError, ValueError, TypeError, KeyError):
            continue
        if pieces is not None and _agrees(tokenizer, pieces):
            return pieces
    return None


def go_template(pieces: Pieces) -> str:
    """The pieces as a Go template, in one line, since its trimming marks would eat newlines."""
    user, answer = [_literal(x) for x in pieces.user], [_literal(x) for x in pieces.assistant]
    start = f"{{{{ if not .System }}}}{_literal(pieces.start)}{{{{ end }}}}" if pieces.start else ""
    system = ""
    if pieces.system is not None:
        before, after = map(_literal, pieces.system)
        system = f'{{{{ else if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}'
    return (
        start + "{{ range $i, $_ := .Messages }}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{user[0]}{{{{ .Content }}}}{user[1]}{system}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer[0]}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{answer[1]}{{{{ end }}}}{{{{ end }}}}"
        f'{{{{ if and (ne .Role "assistant") $last }}}}{_literal(pieces.prompt)}{{{{ end }}}}'
        "{{ end }}"
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise ArtefactError(
            f"--export ollama: the tokenizer does not load: {text}",
            "leave the option away, and write the Modelfile by hand",
        ) from None
    return found


def _pieces(tokenizer: PreTrainedTokenizerBase, with_system: bool) -> Pieces | None:
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    open_talk = _render(tokenizer, [user], prompt=True)
    closed = _render(tokenizer, [user], prompt=False)
    talk = _render(tokenizer, [user, answer, user], prompt=True)
    first, between, after_answer = talk.partition(USER)[0], *_between(talk)
    user_close = closed.partition(USER)[2]
    prompt = open_talk.partition(USER)[2].removeprefix(user_close)
    answered = _render(tokenizer, [user, answer], prompt=False)
    assistant_close = answered.partition(ANSWER)[2]
    user_open = after_answer.removeprefix(assistant_close)
    if not between.startswith(user_close) or not first.endswith(user_open):
        return None
    assistant_open = between.removeprefix(user_close)
    system = None
    if with_system:
        told = {"role": "system", "content": SYSTEM}
        text = _render(tokenizer, [told, user], prompt=True)
        before, _, rest = text.partition(SYSTEM)
        inner = rest.partition(USER)[0]
        if not inner.endswith(user_open):
            return None
        system = (before, inner[: len(inner) - len(user_open)])
    start = first[: len(first) - len(user_open)]
    around_answer = (assistant_open, assistant_close)
    return Pieces(start, system, (user_open, user_close), around_answer, prompt)


def _between(talk: str) -> tuple[str, str]:
    """What stands between question and answer, and between answer and next question."""
    rest = talk.partition(USER)[2]
    between, _, tail = rest.partition(ANSWER)
    return between, tail.partition(USER)[0]


def _agrees(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> bool:
    for roles in SPEECHES.values():
        if pieces.system is None and "system" in roles:
            continue
        messages = [
            {"role": role, "content": f"Some {role} text {place}."}
            for place, role in enumerate(roles)
        ]
        if pieces.render(messages) != _render(tokenizer, messages, prompt=True):
            return False
    return '"""' not in go_template(pieces)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, prompt: bool) -> str:
    """The tokenizer's own text, without the begin token, which Ollama adds itself."""
    text = str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    )
    return text.removeprefix(tokenizer.bos_token or "")


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
