"""Why a run does not start or does not finish, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from textwrap import indent

from peftcli.errors import InterruptedRun, NumericalError, ResourceError, UsageError
from peftcli.estimate.gpus import GIB
from peftcli.estimate.result import Estimate, MemoryEstimate
from peftcli.events import Listener, Warned
from peftcli.machine import free_host_memory
from peftcli.run_dir import RunDir
from peftcli.train import checkpoints
from peftcli.train.memory import HOST_SPARE_GIB, host_room_gib, peak_memory_gib
from peftcli.train.setting import Setting
from peftcli.train.storage import how_to_go_on
from peftcli.words import counted


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
    if estimate is None:
        return
    memory = estimate.memory
    if not estimate.holds:
        text = (
            f"this run needs about {memory.needed_gib:.1f} GiB and {setting.device.name} has "
            f"{memory.available_gib:.1f} GiB free{_host_missing(estimate)}"
        )
        hint = what_to_change(estimate)
    elif not host_holds(memory):
        text = (
            f"training.checkpointing: offload puts about {memory.host_gib:.1f} GiB into host "
            f"memory, and {free_host_memory() / GIB:.1f} GiB are free"
        )
        hint = "lower data.max_length or training.micro_batch_size, or use a machine with more"
    else:
        return
    if force:
        tell(Warned(f"--force: {text}"))
        return
    raise ResourceError(text, f"{hint}; --force tries anyway")


def host_holds(memory: MemoryEstimate) -> bool:
    """Whether the machine has the host memory that offloaded inputs take, and a little more."""
    return not memory.host_gib or memory.host_gib <= host_room_gib()


def _host_missing(estimate: Estimate) -> str:
    """What the machine lacks for the run to fit with offload; nothing where that is not it."""
    if not estimate.offload_needs_gib:
        return ""
    return (
        "; with `checkpointing: offload` it would fit, which puts about "
        f"{estimate.offload_needs_gib:.1f} GiB into host memory, and "
        f"{free_host_memory() / GIB:.1f} GiB are free there, {HOST_SPARE_GIB:g} of them for the "
        "run itself"
    )


def what_to_change(estimate: Estimate) -> str:
    """The changes that make it fit, or the largest cards where none does; in one line."""
    single = [f"{x.line} (saves {x.saves_gib:.1f} GiB)" for x in estimate.changes]
    if any(x.fits for x in estimate.changes):
        return "write one of: " + "; ".join(single)
    if estimate.paste:
        return f"write all of:\n{indent(estimate.paste, '  ')}\n"
    cards = ", ".join(card.name for card in estimate.other_gpus)
    return f"no change of the recipe is enough; it fits {cards or 'no single card that we know'}"


def out_of_memory(
    setting: Setting, folder: RunDir, step: int, estimate: Estimate | None
) -> ResourceError:
    """The error of a run that did not fit: where memory went, and the cheapest ways out.

    `estimate` is of the plan that ran, with changes; None where no GPU is described.
    """
    plan, device = setting.plan, setting.device
    longest = setting.prepared.report.train.length_max
    of = f" of {device.memory_gib:.1f}" if device.memory_gib else ""
    text = (
        f"{device.name} ran out of memory at step {step + 1}: peak {peak_memory_gib():.1f}{of} GiB "
        f"with {counted(plan.micro_batch_size, 'row')} of up to {longest} tokens"
    )
    if estimate is not None:
        parts = sorted(estimate.memory.parts, key=lambda part: -part.gib)
        shown = ", ".join(f"{part.name} {part.gib:.2f}" for part in parts if part.gib >= 0.01)
        text += f"\n  estimated, in GiB: {shown}"
    ways = [f"{x.line} (saves {x.saves_gib:.1f} GiB)" for x in estimate.changes] if estimate else []
    if plan.micro_batch_size > 1:
        ways.append("training.on_oom: shrink (halves the rows at a time by itself)")
    elif not ways:
        ways.append(f"data.max_length: {longest // 2}")
    return ResourceError(
        text,
        f"write one of: {'; '.join(ways)}; {how_to_go_on(folder)}, --force with it if the plan "
        "changes",
    )


def interrupted(received: str | None, folder: RunDir, steps: int) -> InterruptedRun:
    """The end of a run that a signal stopped and that can go on."""
    saved = max(checkpoints.steps(folder.checkpoints), default=0)
    where = f"after step {saved} of {steps} was saved" if saved else "before a step was saved"
    return InterruptedRun(f"stopped by {received} {where}", how_to_go_on(folder))


def blown_up(failure: str, folder: RunDir) -> NumericalError:
    """The end of a run whose numbers are not finite."""
    return NumericalError(
        f"training stopped: {failure}",
        "lower training.learning_rate, look at the rows of that step, or write "
        f"training.on_nonfinite: skip; {how_to_go_on(folder)}",
    )
