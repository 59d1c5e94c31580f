"""Estimates on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import indent

from peftcli.estimate.gpus import Gpu
from peftcli.estimate.prices import prices
from peftcli.estimate.result import Estimate, MemoryEstimate, Settings, TimeEstimate

Rows = Sequence[Sequence[str]]
SHOWN_GIB = 0.05  # what is not 0.0 with one digit
SPEED = {
    "measured": "",
    "published": "; the card's speed follows from runs that others published",
    "data sheet": "; the card's speed follows from its data sheet",
}


def show_estimate(estimate: Estimate, *, explain: bool) -> None:
    """Verdict, memory, time, cost, and what to change."""
    memory, chosen = estimate.memory, estimate.settings
    print(f"{estimate.model} on {estimate.gpu}: {estimate.verdict}")
    print(
        f"  trains {estimate.trainable:,} of {estimate.parameters:,} parameters "
        f"({estimate.trainable / estimate.parameters:.2%}), saved in {_size(estimate)}"
    )
    _show_memory(memory)
    print(
        f"  with micro_batch_size {chosen.micro_batch_size} x {chosen.accumulation}, checkpointing "
        f"{chosen.checkpointing}, {chosen.tokens_per_row:,} tokens a row, {chosen.optimizer}"
    )
    if estimate.limits is not None:
        most = estimate.limits
        host = f", and {most.host_gib:.0f} GiB of host memory" if most.host_gib else ""
        one = f", or one row of {most.tokens_per_row:,} tokens" if most.tokens_per_row else ""
        print(
            f"  at most {most.micro_batch_size:,} of these rows at a time{one}, with checkpointing "
            f"{most.checkpointing}{host}"
        )
    if estimate.time is not None:
        print(f"  {_run(estimate.time)}{_price(estimate)}{SPEED[estimate.time.speed]}")
    if estimate.merge is not None and explain:
        merge = estimate.merge
        print(
            f"  merging: {merge.host_gib:.1f} GiB of host memory, {merge.verify_gib:.1f} GiB with "
            f"the comparison of logits, {merge.disk_gib:.1f} GiB of disk"
        )
    if explain:
        print(f"  the fullest moment: {memory.moment}")
        for part in memory.parts:
            print(f"    {part.gib:8.3f} GiB  {part.name}: {part.formula}")
    _show_changes(estimate)
    for note in estimate.notes:
        print(f"  note: {note}")


def _show_memory(memory: MemoryEstimate) -> None:
    paged = ""
    if memory.paged_gib >= SHOWN_GIB:
        paged = f", {memory.paged_gib:.1f} of it paged states that give way"
    print(
        f"  peak {memory.likely_gib:.1f} GiB allocated ({memory.low_gib:.1f} to "
        f"{memory.high_gib:.1f}), nvidia-smi shows {memory.card_gib:.1f}{paged}; "
        f"{memory.needed_gib:.1f} GiB of the card's {memory.available_gib:.1f} to be safe; "
        f"loading {memory.loading_gib:.1f} GiB"
    )


def _show_changes(estimate: Estimate) -> None:
    for advice in estimate.changes:
        enough = "fits then" if advice.fits else "not enough alone"
        print(f"  {advice.line}  saves {advice.saves_gib:.1f} GiB, {enough}; {advice.consequence}")
    if estimate.paste:
        print("  it fits with these lines of the recipe:")
        print(indent(estimate.paste, "    "))
    for other in estimate.other_gpus:
        price = f", from {other.low_price_usd:.2f} USD an hour" if other.low_price_usd else ""
        print(f"  fits {other.name} ({other.memory_gib:.0f} GiB{price})")


def show_gpus(estimates: Sequence[Estimate]) -> None:
    """One line for each card."""
    head = ("GPU", "verdict", "micro", "ckpt", "peak GiB", "to be safe", "s/step", "time", "USD")
    rows = [
        (
            item.gpu,
            item.verdict,
            str(item.settings.micro_batch_size),
            str(item.settings.checkpointing),
            f"{item.memory.likely_gib:.1f}",
            f"{item.memory.needed_gib:.1f}",
            f"{item.time.step_seconds:.2f}" if item.time else "?",
            hours(item.time.likely_seconds if item.time else None),
            cost(item.time),
        )
        for item in estimates
    ]
    print(table(head, rows))
    _show_shared_notes(estimates)


def show_methods(
    estimates: Sequence[tuple[str, Estimate]], card: Gpu, cards: Mapping[str, Gpu | None]
) -> None:
    """One line for each method, at the same micro-batch."""
    first = estimates[0][1].settings
    print(
        f"{estimates[0][1].model} on {card.name}, micro_batch_size {first.micro_batch_size}, "
        f"checkpointing {first.checkpointing}, {first.tokens_per_row:,} tokens a row"
    )
    head = ("method", "trained", "file", "verdict", "peak GiB", "s/step", "time", "cheapest card")
    rows = [
        (
            name + _other_mode(item, first),
            f"{item.trainable:,}",
            _size(item),
            item.verdict,
            f"{item.memory.likely_gib:.1f}",
            f"{item.time.step_seconds:.2f}" if item.time else "?",
            hours(item.time.likely_seconds if item.time else None),
            _card(cards[name]),
        )
        for name, item in estimates
    ]
    print(table(head, rows))
    _show_shared_notes([item for _, item in estimates])


def _show_shared_notes(estimates: Sequence[Estimate]) -> None:
    """What is to know of every line of a table."""
    first, *others = estimates
    for note in first.notes:
        if all(note in other.notes for other in others):
            print(f"note: {note}")


def _other_mode(item: Estimate, first: Settings) -> str:
    """What a method does otherwise than the first: plain layers cannot offload."""
    mode = item.settings.checkpointing
    return "" if mode == first.checkpointing else f" (checkpointing {mode})"


def table(head: Sequence[str], rows: Rows) -> str:
    """Columns as wide as their widest cell; the first is text, the others stand to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        first, *rest = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def hours(seconds: float | None) -> str:
    """A duration as people say it."""
    if seconds is None:
        return "?"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def cost(time: TimeEstimate | None) -> str:
    """Dollars from the cheapest to the dearest."""
    if time is None or time.low_cost_usd is None or time.high_cost_usd is None:
        return "?"
    return f"{time.low_cost_usd:.2f} to {time.high_cost_usd:.2f}"


def _dollars(low: float, high: float) -> str:
    """From the cheapest to the dearest, once where that is the same."""
    cheap, dear = f"{low:.2g}", f"{high:.2g}"
    return cheap if cheap == dear else f"{cheap} to {dear}"


def _run(time: TimeEstimate) -> str:
    rate = f"{time.tokens_per_second:,.0f} tokens/s"
    if time.steps is None:
        low, high = time.low_usd_per_million_tokens, time.high_usd_per_million_tokens
        million = f", {_dollars(low, high)} USD a million tokens" if low and high else ""
        span = f"{time.low_step_seconds:.2f} to {time.high_step_seconds:.2f}"
        return f"{time.step_seconds:.2f} s a step, {span} ({rate}{million})"
    money = f", {cost(time)} USD" if time.low_cost_usd is not None else ""
    return (
        f"{time.steps:,} steps of {time.step_seconds:.2f} s: {hours(time.low_seconds)} to "
        f"{hours(time.high_seconds)}{money} ({rate})"
    )


def _price(estimate: Estimate) -> str:
    """Where the price comes from; nothing where --price or no price was used."""
    time, row = estimate.time, prices().get(estimate.gpu)
    if time is None or row is None or estimate.own_price:
        return ""
    return f"; {row.low:.2f} to {row.high:.2f} USD an hour, read {row.read}, no promise"


def _card(gpu: Gpu | None) -> str:
    if gpu is None:
        return "none"
    price = gpu.price_per_hour_usd
    return f"{gpu.name}, {price[0]:.2f} USD/h" if price else gpu.name


def _size(estimate: Estimate) -> str:
    gib = estimate.adapter_file_gib
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
