"""An estimate beside a measurement, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftcli.estimate.duration import HOST_BAND, cpu_share
from peftcli.estimate.find import find_architecture
from peftcli.estimate.gpus import Gpu
from peftcli.estimate.question import Question
from peftcli.estimate.result import Estimate, Rows
from peftcli.estimate.show import table
from peftcli.recipe.schema import Recipe

PARTS = {
    "loading_gib": "peak while loading",
    "base_gib": "base",
    "adapter_gib": "adapter",
    "states_gib": "optimizer states",
    "paged_gib": "paged optimizer states",
    "peak_gib": "peak allocated in a step",
    "reserved_gib": "peak reserved",
    "card_gib": "nvidia-smi",
    "step_seconds": "seconds a step",
}


PACKED_ROWS = 4  # random rows that share a sequence, where rows are packed


def random_rows(recipe: Recipe) -> Rows:
    """The rows that a recipe is measured with: all of the full length, or packed to it."""
    length, training = recipe.data.max_length, recipe.training
    together = PACKED_ROWS if training.packing is True else 1
    return Rows(training.batch_size * together, length // together, length / together)


def waits_for_cpu(recipe: Recipe, gpu: Gpu) -> bool:
    """Whether a slow CPU, which takes as long as the told range allows, would lengthen a step."""
    question = Question(find_architecture(recipe.model.name), gpu, random_rows(recipe), 0.0)
    (plan,) = question.plans(recipe)
    return HOST_BAND[1] * cpu_share(plan, gpu, question.lengths(recipe, plan)) >= 1


@dataclass(frozen=True)
class Line:
    """One quantity; `error` is how far the prediction lies from the measurement, as a share."""

    part: str
    predicted: float
    measured: float

    @property
    def error(self) -> float | None:
        return self.predicted / self.measured - 1 if self.measured > 0 else None


def predicted(estimate: Estimate) -> dict[str, float]:
    """What an estimate says of each quantity that can be measured."""
    memory = estimate.memory
    found = {
        "loading_gib": memory.loading_gib,
        "base_gib": memory.base_gib,
        "adapter_gib": memory.adapter_gib,
        "states_gib": memory.states_gib,
        "paged_gib": memory.paged_gib,
        "peak_gib": memory.step_gib,
    }
    if memory.step_gib >= memory.loading_gib:  # what is held of the card is told of the fullest
        found |= {"reserved_gib": memory.reserved_gib, "card_gib": memory.card_gib}
    if estimate.time is not None:
        found["step_seconds"] = estimate.time.step_seconds
    return found


def compare(estimate: Estimate, measured: Mapping[str, object]) -> list[Line]:
    """One line for each quantity that was both predicted and measured."""
    said = predicted(estimate)
    lines = []
    for part in PARTS:
        value = measured.get(part)
        if part in said and isinstance(value, float | int):
            lines.append(Line(part, said[part], float(value)))
    return lines


def show_comparison(estimate: Estimate, lines: Sequence[Line]) -> None:
    """The lines as a table."""
    settings = estimate.settings
    print(
        f"{estimate.model} on {estimate.gpu}, {estimate.method}: micro_batch_size "
        f"{settings.micro_batch_size} x {settings.accumulation}, checkpointing "
        f"{settings.checkpointing}, {settings.tokens_per_row:,} tokens a row"
    )
    rows = [
        (
            PARTS[line.part],
            f"{line.predicted:.3f}",
            f"{line.measured:.3f}",
            "" if line.error is None else f"{line.error:+.1%}",
        )
        for line in lines
    ]
    print(table(("GiB, or seconds", "predicted", "measured", "difference"), rows))
    inside = [x for x in lines if x.part == "peak_gib"]
    for line in inside:
        share = estimate.memory.step_gib / estimate.memory.likely_gib
        low, high = share * estimate.memory.low_gib, share * estimate.memory.high_gib
        where = "inside" if low <= line.measured <= high else "OUTSIDE"
        print(f"the measured peak lies {where} the estimate's {low:.2f} to {high:.2f} GiB")
