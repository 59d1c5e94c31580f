"""loss.png: the loss of every step and of every evaluation."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

Points = list[tuple[int, float]]


def plot_losses(target: Path, losses: Points, eval_losses: Points) -> None:
    """Write the curve to `target`; the training loss is also shown smoothed."""
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    steps = [step for step, _ in losses]
    axes.plot(steps, [loss for _, loss in losses], color="#9ecae1", linewidth=1, label="training")
    axes.plot(steps, smoothed(losses), color="#2171b5", linewidth=1.8, label="training, smoothed")
    if eval_losses:
        at = [step for step, _ in eval_losses]
        axes.plot(at, [loss for _, loss in eval_losses], "o-", color="#d94801", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per trained token (nats)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    aside = target.with_name(f".staging-{target.name}")
    figure.savefig(aside, format="png")
    aside.replace(target)


def smoothed(losses: Points, window: int = 20) -> list[float]:
    """The mean over the last steps, at most `window` of them."""
    values = [loss for _, loss in losses]
    recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in recent]
