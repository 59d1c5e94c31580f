"""The `data` section: where rows come from, and what is done with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, field_validator

from peftcli.methods.base import Names, Section
from peftcli.recipe.sections.share import Share, as_share

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "classification",
    "text",
]


def _as_sources(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def _as_eval(value: Any) -> Any:
    value = as_share(value)
    if value is None or isinstance(value, float | int):
        return value
    return _as_sources(value)


class Source(Section):
    """One place that rows come from."""

    path: str = Field(min_length=1)
    """A file, a folder, a glob, or a hub id."""
    split: str = "train"
    """The split of a hub data set."""
    subset: str | None = None
    """The configuration of a hub data set."""
    revision: str | None = None
    """A branch, tag or commit of a hub data set."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often the source is seen: 0.5 takes half of its rows, 2 takes each row twice."""
    limit: int | None = Field(None, ge=1)
    """Take at most this many rows of the source."""
    format: Format | None = None
    """The row format of this source; that of the data section when absent."""
    columns: dict[str, str] | None = None
    """Name in the format -> name in the file, for this source."""
    labels: Names | dict[str, str] | None = None
    """Label names for this source, by position or by value."""


Sources = Annotated[tuple[Source, ...], Strict(False), Field(min_length=1)]


class Data(Section):
    """Rows, and what is trained on in them."""

    train: Annotated[Sources, BeforeValidator(_as_sources)]
    """A file, folder, glob or hub id; or a list of them, each with weight, limit, split."""
    eval: Annotated[Share | Sources | None, BeforeValidator(_as_eval)] = 0.05
    """A share of the training rows (`5%`), a source like `train`, or `null` for none."""
    format: Format = "auto"
    """The row format; `auto` decides by content and says what it saw."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Name in the format -> name in the file, for instance `{prompt: question}`."""
    labels: Names | dict[str, str] | None = None
    """Names of the labels of a classification set, by position or by value."""
    system: str | None = None
    """A system message for rows that have none."""
    train_on: Literal["answers", "all", "last"] = "answers"
    """Which tokens carry loss: every assistant turn, every token, or the last turn only."""
    chat_template: str | None = None
    """A template's name, a .jinja file, or the tokenizer's own when absent."""
    max_length: int = Field(2048, ge=8, le=100_000_000)
    """The longest row in tokens."""
    too_long: Literal["auto", "error", "drop", "truncate", "split"] = "auto"
    """What happens to longer rows; `auto` splits plain text into pieces and truncates the rest."""
    bad_rows: Literal["error", "skip"] = "error"
    """Whether one row that cannot be read stops the run."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What happens to rows that occur twice; they are counted either way."""
    overlap: Literal["drop", "allow", "error"] = "drop"
    """What happens to evaluation rows that are training rows too."""
    limit: int | None = Field(None, ge=1)
    """Take at most this many training rows in all."""

    def paths(self) -> list[str]:
        """What every source of both splits names."""
        held_out = self.eval if isinstance(self.eval, tuple) else ()
        return [source.path for source in (*self.train, *held_out)]

    @field_validator("eval")
    @classmethod
    def _real_share(cls, value: Any) -> Any:
        if isinstance(value, float | int) and not 0 < value < 1:
            raise ValueError("a share lies between 0 % and 100 %; write `5%`, a file, or `null`")
        return value
