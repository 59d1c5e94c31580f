"""Estimates on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from peftcli.estimate.result import Estimate, TimeEstimate


def show_estimate(estimate: Estimate, *, explain: bool) -> None:
    """Verdict, memory, time, cost, and what to change."""
    memory, chosen = estimate.memory, estimate.settings
    print(f"{estimate.model} on {estimate.gpu}: {estimate.verdict}")
    print(
        f"  trains {estimate.trainable:,} of {estimate.parameters:,} parameters "
        f"({estimate.trainable / estimate.parameters:.2%})"
    )
    print(
        f"  peak {memory.likely_gib:.1f} GiB allocated ({memory.low_gib:.1f} to "
        f"{memory.high_gib:.1f}), {memory.needed_gib:.1f} GiB of the card's "
        f"{memory.available_gib:.1f} to be safe; loading {memory.loading_gib:.1f} GiB"
    )
    print(
        f"  with micro_batch_size {chosen.micro_batch_size} x {chosen.accumulation}, checkpointing "
        f"{chosen.checkpointing}, {chosen.tokens_per_row:,} tokens a row, {chosen.optimizer}"
    )
    if estimate.time is not None:
        print(f"  {_time(estimate.time)}")
    if explain:
        for part in memory.parts:
            print(f"    {part.gib:8.3f} GiB  {part.name}: {part.formula}")
    for advice in estimate.changes:
        enough = "fits then" if advice.fits else "not enough alone"
        print(f"  {advice.line}  saves {advice.saves_gib:.1f} GiB, {enough}; {advice.consequence}")
    for other in estimate.other_gpus:
        price = f", from {other.low_price_usd:.2f} USD an hour" if other.low_price_usd else ""
        print(f"  fits {other.name} ({other.memory_gib:.0f} GiB{price})")
    for note in estimate.notes:
        print(f"  note: {note}")


def show_estimates(estimates: Sequence[tuple[str, Estimate]], heading: str) -> None:
    """One line for each of several estimates, such as methods side by side or GPUs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(heading, "verdict", "trained", "peak GiB", "to be safe", "time", "cost USD")
    for name, estimate in estimates:
        time = estimate.time
        table.add_row(
            name,
            estimate.verdict,
            f"{estimate.trainable:,}",
            f"{estimate.memory.likely_gib:.1f}",
            f"{estimate.memory.needed_gib:.1f}",
            _hours(time.likely_seconds) if time else "?",
            _cost(time),
        )
    Console(highlight=False).print(table)


def _time(time: TimeEstimate) -> str:
    cost = f", {_cost(time)} USD" if time.low_cost_usd is not None else ""
    return (
        f"{time.steps:,} steps of {time.step_seconds:.2f} s: {_hours(time.low_seconds)} to "
        f"{_hours(time.high_seconds)}{cost} ({time.tokens_per_second:,.0f} tokens/s)"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _cost(time: TimeEstimate | None) -> str:
    if time is None or time.low_cost_usd is None or time.high_cost_usd is None:
        return "?"
    return f"{time.low_cost_usd:.2f} to {time.high_cost_usd:.2f}"
