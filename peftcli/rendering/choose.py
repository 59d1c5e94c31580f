"""Which chat template a run uses, and what the tokenizer adds by itself."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from transformers import PreTrainedTokenizerBase  # noqa: TID253 - this file is heavy

from peftcli.errors import ArtefactError, DataError
from peftcli.paths import expanded
from peftcli.rendering.probe import Turns, probe
from peftcli.rendering.template import ChatTemplate, TemplateSource
from peftcli.rendering.time_limit import PROBE_SECONDS, time_limit

NAMED = ("plain", "chatml")
NO_TURNS = Turns((), (), (), "", False, False, False)


def choose_template(
    tokenizer: PreTrainedTokenizerBase, wanted: str | None, base_dir: Path
) -> TemplateSource:
    """The template of a run: the one wanted, the tokenizer's own, or `plain`.

    A template that is not the tokenizer's own is given to it, so that it is saved with the model.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if wanted is None and own:
        return _source(tokenizer, own, "the tokenizer's own")
    if wanted is None or wanted in NAMED:
        name = wanted or "plain"
        text = (files("peftcli") / "templates" / f"{name}.jinja").read_text("utf-8")
        if adds_begin(tokenizer):
            text = "{{- bos_token -}}\n" + text
        origin = f"{name}, built in" if wanted else "plain, because the tokenizer has none"
    else:
        text, origin = _file(wanted, base_dir), wanted
    tokenizer.chat_template = text
    return _source(tokenizer, text, origin)


def added_tokens(tokenizer: PreTrainedTokenizerBase, template: TemplateSource) -> tuple[str, ...]:
    """Control tokens: the special ones, and added ones that the template writes."""
    tokens = tokenizer.added_tokens_decoder.values()
    found = [token.content for token in tokens if token.special or token.content in template.text]
    return tuple(sorted({content for content in found if content.strip()}))


def learn_turns(
    tokenizer: PreTrainedTokenizerBase, template: TemplateSource
) -> tuple[Turns, tuple[int, ...]]:
    """How answers open and close, and the ids of the tokens that end a generation."""
    with time_limit(PROBE_SECONDS):
        turns = probe(ChatTemplate(template), added_tokens(tokenizer, template))
    stops = []
    for text in turns.stops:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stops.append(int(ids[-1]))
    return turns, tuple(dict.fromkeys(stops))


def adds_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokenising a text puts the begin token before it."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that cannot say which characters a token holds, or that have no end."""
    if not tokenizer.is_fast:
        raise ArtefactError(
            f"model: the tokenizer is a {type(tokenizer).__name__}, which gives no character "
            "positions, so answers could not be told from questions",
            "convert it to a tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise ArtefactError(
            "model: the tokenizer has no end-of-text token",
            "set `eos_token` in its tokenizer_config.json",
        )
    text = "Question? 1 + 1\nAnswer: 2"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(ids) != tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids:
        raise ArtefactError(
            "model: the tokenizer changes the text before its tokenizer.json sees it",
            "use a tokenizer without Python code of its own",
        )


def _source(tokenizer: PreTrainedTokenizerBase, text: str, origin: str) -> TemplateSource:
    special = {
        name: value
        for name, value in tokenizer.special_tokens_map.items()
        if isinstance(value, str)
    }
    return TemplateSource(text, origin, special)


def _file(name: str, base_dir: Path) -> str:
    path = base_dir / expanded(name)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(
            f"data.chat_template: {name} cannot be read: {reason}",
            f"write one of {', '.join(NAMED)}, or the path of a .jinja file",
        ) from None
