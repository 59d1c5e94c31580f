"""Why a run does not start or does not finish, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from textwrap import indent

from peftcli.errors import InterruptedRun, NumericalError, ResourceError, UsageError
from peftcli.estimate.result import Estimate
from peftcli.events import Listener, Warned
from peftcli.run_dir import RunDir
from peftcli.train import checkpoints
from peftcli.train.monitor import peak_memory_gib
from peftcli.train.setting import Setting


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for an experiment tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"training.report_to: {name} is not installed",
                f"pip install 'peftcli[{name}]', or remove it from the list",
            )


def refuse_what_cannot_fit(setting: Setting, tell: Listener, *, force: bool) -> None:
    """Raise ResourceError before the weights load when the estimate leaves no hope."""
    estimate = setting.estimate
    if estimate is None or estimate.holds:
        return
    memory = estimate.memory
    text = (
        f"this run needs about {memory.needed_gib:.1f} GiB and {setting.device.name} has "
        f"{memory.available_gib:.1f} GiB free"
    )
    if force:
        tell(Warned(f"--force: {text}"))
        return
    raise ResourceError(text, f"{what_to_change(estimate)}; --force tries anyway")


def what_to_change(estimate: Estimate) -> str:
    """The changes that make it fit, or the largest cards where none does; in one line."""
    single = [f"{x.line} (saves {x.saves_gib:.1f} GiB)" for x in estimate.changes]
    if any(x.fits for x in estimate.changes):
        return "write one of: " + "; ".join(single)
    if estimate.paste:
        return f"write all of:\n{indent(estimate.paste, '  ')}\n"
    cards = ", ".join(card.name for card in estimate.other_gpus)
    return f"no change of the recipe is enough; it fits {cards or 'no single card that we know'}"


def out_of_memory(setting: Setting) -> ResourceError:
    """The error of a run that did not fit, with the cheapest ways out."""
    plan, device = setting.plan, setting.device
    longest = setting.prepared.report.train.length_max
    ways = []
    if not plan.checkpointing:
        ways.append("training.checkpointing: full")
    if plan.micro_batch_size > 1:
        ways.append(f"training.micro_batch_size: {plan.micro_batch_size // 2}")
    ways.append("data.max_length: half of what it is")
    return ResourceError(
        f"{device.name} ran out of memory: {peak_memory_gib():.1f} of {device.memory_gib:.1f} GiB "
        f"at {plan.micro_batch_size} rows of up to {longest} tokens",
        "write one of: " + "; ".join(ways),
    )


def interrupted(received: str | None, folder: RunDir, steps: int) -> InterruptedRun:
    """The end of a run that a signal stopped and that can go on."""
    saved = max(checkpoints.steps(folder.checkpoints), default=0)
    return InterruptedRun(
        f"stopped by {received} after step {saved} of {steps} was saved",
        "the same command with --resume goes on",
    )


def blown_up(failure: str, folder: RunDir) -> NumericalError:
    """The end of a run whose numbers are not finite."""
    return NumericalError(
        f"training stopped: {failure}",
        "lower training.learning_rate, or try model.dtype: bfloat16; the last checkpoint is in "
        f"{folder.checkpoints}",
    )
