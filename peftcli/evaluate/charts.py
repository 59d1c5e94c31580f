"""Charts as inline SVG: scores with error bars, and the loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 700
LABEL = 96
VALUE = 210
ROW = 30
CURVE_HEIGHT = 220
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Bar:
    """A value with its interval."""

    name: str
    value: float
    low: float
    high: float
    text: str


def bars(rows: Sequence[Bar], *, lowest: float = 0.0, highest: float | None = None) -> str:
    """Horizontal bars from `lowest`, each with a whisker and its figures."""
    top = highest if highest is not None else max(row.high for row in rows)
    top = top if top > lowest else lowest + 1
    scale = (WIDTH - LABEL - VALUE) / (top - lowest)

    def at(value: float) -> float:
        return LABEL + (min(max(value, lowest), top) - lowest) * scale

    height = ROW * len(rows) + 6
    parts = [_open(height, "; ".join(f"{row.name} {row.text}" for row in rows))]
    for number, row in enumerate(rows):
        middle = ROW * number + ROW / 2 + 3
        kind = escape(row.name, quote=True)
        parts += [
            f'<text class="name" x="{LABEL - 10}" y="{middle + 4:.1f}">{kind}</text>',
            f'<rect class="bar {kind}" x="{LABEL}" y="{middle - 9:.1f}" '
            f'width="{max(1.0, at(row.value) - LABEL):.1f}" height="18" rx="3"/>',
            f'<path class="whisker" d="M{at(row.low):.1f} {middle:.1f}H{at(row.high):.1f}'
            f"M{at(row.low):.1f} {middle - 5:.1f}v10M{at(row.high):.1f} {middle - 5:.1f}v10"
            '"/>',
            f'<text class="value" x="{WIDTH - VALUE + 10}" y="{middle + 4:.1f}">'
            f"{escape(row.text)}</text>",
        ]
    return "".join([*parts, "</svg>"])


def curve(losses: Points, held_out: Points) -> str:
    """Training loss, thin, with its running mean, and held-out loss as dots."""
    every = [value for _, value in (*losses, *held_out) if math.isfinite(value)]
    steps = [step for step, _ in (*losses, *held_out)]
    low, high, last = min(every), max(every), max(steps)
    margin = 0.06 * (high - low or 1.0)
    low, high = max(0.0, low - margin), high + margin

    def place(step: float, value: float) -> str:
        x = 52 + (WIDTH - 72) * step / max(1, last)
        y = 12 + (CURVE_HEIGHT - 44) * (high - value) / (high - low)
        return f"{x:.1f} {y:.1f}"

    parts = [_open(CURVE_HEIGHT, f"loss over {last} steps")]
    for tick in _ticks(low, high):
        y = place(0, tick).split()[1]
        parts.append(f'<path class="grid" d="M52 {y}H{WIDTH - 20}"/>')
        parts.append(f'<text class="tick" x="46" y="{float(y) + 4:.1f}">{tick:.3g}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = place(last * share, low).split()[0]
        label = f"{round(last * share)}"
        parts.append(f'<text class="step" x="{x}" y="{CURVE_HEIGHT - 10}">{label}</text>')
    if losses:
        parts.append(_line("raw", [place(*point) for point in losses]))
        parts.append(_line("mean", [place(*point) for point in _running_mean(losses)]))
    if held_out:
        points = [place(*point) for point in held_out]
        parts.append(_line("held", points))
        parts += [f'<circle class="dot" r="3" {_center(point)}/>' for point in points]
    return "".join([*parts, "</svg>"])


def _open(height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>"
    )


def _line(kind: str, points: Sequence[str]) -> str:
    return f'<path class="{kind}" d="M{"L".join(points)}"/>'


def _center(point: str) -> str:
    x, y = point.split()
    return f'cx="{x}" cy="{y}"'


def _running_mean(points: Points) -> list[tuple[int, float]]:
    window = max(1, min(20, len(points) // 8))
    found = []
    for end, (step, _) in enumerate(points, start=1):
        recent = [value for _, value in points[max(0, end - window) : end]]
        found.append((step, sum(recent) / len(recent)))
    return found


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers between the two."""
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]
