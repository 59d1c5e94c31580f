"""Which format a row is in, and what to write in the recipe when that cannot be known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peftcli.data.formats import FORMATS, Format, Row
from peftcli.data.messages import RowError, found

# Columns beside `text` that say nothing to a language model.
METADATA = frozenset(
    (
        "id", "idx", "index", "source", "url", "meta", "metadata", "timestamp", "date", "added",
        "created", "title", "lang", "language", "license", "domain", "subset", "split", "author",
        "score", "tokens", "token_count", "dump", "file_path",
    )
)  # fmt: skip
# Names under which a prompt or an answer is often met, best first.
PROMPTS = (
    "prompt", "question", "instruction", "query", "input", "problem", "text", "mr", "source",
    "context", "document", "user", "sentence", "article", "title", "src",
)  # fmt: skip
ANSWERS = (
    "completion", "response", "answer", "output", "canonical_solution", "solution", "chosen",
    "code", "target", "ref", "reference", "summary", "label", "category", "assistant", "tgt",
    "reply", "highlights", "sql",
)  # fmt: skip


@dataclass(frozen=True)
class Detection:
    """The format of a source, where its fields are, and the reason in one line."""

    name: str
    columns: Mapping[str, str]
    why: str


def detect(row: Row, name: str = "auto", columns: Mapping[str, str] | None = None) -> Detection:
    """The format of `row`; RowError with the columns found and the line to write when unknown."""
    columns = columns or {}
    if name != "auto":
        entry = FORMATS[name]
        fields = (*entry.fields, *entry.optional)
        wrong = ", ".join(key for key in columns if key not in fields)
        if wrong:
            raise RowError(f"`columns` maps {wrong}, but {name} has {', '.join(fields)}")
        return Detection(name, _matched(entry, row, columns) or columns, "named in the recipe")
    if "chosen" in row and "rejected" in row and "chosen" not in columns.values():
        raise RowError(
            "this is preference data (chosen, rejected), and peftcli trains on answers alone; to "
            "train on the chosen ones, name them: " + _chosen_line(row)
        )
    for entry in FORMATS.values():
        matched = _matched(entry, row, columns)
        if matched is not None and not (entry.name == "text" and _ambiguous(row, columns)):
            seen = ", ".join(matched[canonical] for canonical in entry.fields)
            return Detection(entry.name, matched, f"found {seen}")
    raise RowError(_unknown(row, columns))


def _matched(entry: Format, row: Row, columns: Mapping[str, str]) -> dict[str, str] | None:
    """Where each field of `entry` is, or None when one is missing or `columns` names others."""
    if not set(columns) <= {*entry.fields, *entry.optional}:
        return None
    matched = {}
    for canonical, names in entry.fields.items():
        accepted = (columns[canonical],) if canonical in columns else names
        column = next((known for known in accepted if known in row), None)
        if column is None or (canonical in entry.lists and not isinstance(row[column], list)):
            return None
        matched[canonical] = column
    return matched | dict(columns)


def _ambiguous(row: Row, columns: Mapping[str, str]) -> bool:
    """Whether other columns hold text too, so that `text` may be a prompt only."""
    others = [key for key in row if key != "text" and key.lower() not in METADATA]
    return "text" not in columns and any(isinstance(row[key], str | list) for key in others)


def _unknown(row: Row, columns: Mapping[str, str]) -> str:
    known = "; ".join(f"{name}: {', '.join(form.fields)}" for name, form in FORMATS.items())
    listed = ", ".join(str(key)[:40] for key in list(row)[:20]) or "none"
    if columns:
        missing = [column for column in columns.values() if column not in row]
        reason = (
            f"`columns` names {', '.join(missing)}, not in the file"
            if missing
            else f"`columns` maps {', '.join(columns)}, which no format has together"
        )
        return f"{reason}; columns found: {listed}; formats: {known}"
    return f"unknown form; columns found: {listed}; {nearest(row)}; formats: {known}"


def nearest(row: Row) -> str:
    """The `columns:` line that is most likely meant, or why there is none."""
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ", ".join(str(name) for name in list(value[0])[:6])
            return f"'{key}' is a list of maps with {inner}, but messages need role and content"
    texts = [key for key, value in row.items() if isinstance(value, str)]
    answer = next((name for name in ANSWERS if name in texts), None)
    prompt = next((name for name in PROMPTS if name in texts and name != answer), None)
    rest = [key for key in texts if key not in (prompt, answer)]
    prompt = prompt or (rest.pop(0) if rest else None)
    answer = answer or (rest.pop(0) if rest else None)
    if prompt and answer:
        only = "; for plain text write `format: text`" if "text" in row else ""
        return f"perhaps `columns: {{prompt: {prompt}, completion: {answer}}}`{only}"
    if prompt:
        return f"perhaps `columns: {{text: {prompt}}}`"
    kinds = ", ".join(f"{key} ({found(value)})" for key, value in list(row.items())[:4])
    return f"no column holds a text: {kinds}"


def _chosen_line(row: Row) -> str:
    if isinstance(row.get("conversations"), list):
        return "`columns: {conversations: conversations, answer: chosen}`"
    if isinstance(row["chosen"], list):
        return "`columns: {messages: chosen}`"
    return (
        f"`columns: {{prompt: {'prompt' if 'prompt' in row else 'question'}, completion: chosen}}`"
    )
