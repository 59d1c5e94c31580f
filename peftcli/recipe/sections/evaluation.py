"""The `evaluation` section, and its `gates`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from peftcli.errors import UsageError
from peftcli.methods.base import Names, Section
from peftcli.recipe.sections.share import Share

if TYPE_CHECKING:
    from peftcli.metrics import Metric


class Gates(Section):
    """Conditions on the finished model; each fails only when the rows show that it is broken."""

    fail_under: dict[str, Share] = Field(default_factory=dict)
    """Metric -> the least score of the tuned model, such as `{exact_match: 80%}`."""
    min_gain: Share | None = None
    """The least gain over the base in the first metric; 0 means no regression."""
    max_forgetting: Annotated[Share, Field(ge=0)] | None = None
    """The most that the loss on retained text may rise: `2%`."""
    max_merge_drift: Annotated[Share, Field(ge=0)] | None = None
    """The most that merging may change the loss: `0.1%`."""
    require_proof: bool = False
    """Whether a condition that the rows leave open fails too."""

    @field_validator("fail_under")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name, limit in value.items():
            if _metric(name).percent and not 0 <= limit <= 1:
                raise ValueError(
                    f"{name} lies between 0 and 1, found {limit:g}; write `{limit:g}%`"
                )
        return value


class Evaluation(Section):
    """When the held-out rows are looked at during training, and how the result is judged."""

    steps: int | None = Field(None, ge=1)
    """Steps between evaluations; ten times a run when absent."""
    batch_size: int | None = Field(None, ge=1)
    """Rows per evaluation batch; the micro-batch when absent."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better loss."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """How much lower the loss must be to count as better."""
    keep_best: bool = True
    """Save the adapter of the best evaluation; `false` saves the last."""
    metrics: Names = ()
    """Scores of `peftcli eval`, the first one gates; chosen by content when empty."""
    retain: Names | None = None
    """Text that should not be forgotten: files, `[]` for none; the bundled text when absent."""
    max_new_tokens: int | None = Field(None, ge=1)
    """The longest answer; a quarter longer than the longest reference when absent."""
    gates: Gates | None = None
    """Conditions on the finished model; with some, `train` ends with an evaluation."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _metric(name)
        return value


def _metric(name: str) -> Metric:
    from peftcli.metrics import find_metric  # most recipes name none

    try:
        return find_metric(name)
    except UsageError as error:
        raise ValueError(error.message) from None
