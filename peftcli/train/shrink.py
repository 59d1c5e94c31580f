"""Going on with half the rows at a time, or inputs in host memory, after what did not fit."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from peftcli.estimate.plan import Mode
from peftcli.estimate.result import Estimate
from peftcli.events import Listener, Warned
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir
from peftcli.train.attempt import RanOut
from peftcli.train.begin import Ground
from peftcli.train.plan import Plan, smaller
from peftcli.train.refusals import host_holds, out_of_memory
from peftcli.train.setting import Setting, on_this_gpu
from peftcli.words import counted


def shrunk(
    recipe: Recipe,
    ground: Ground,
    setting: Setting,
    folder: RunDir,
    outcome: RanOut,
    tell: Listener,
) -> tuple[Setting, Path | None]:
    """The thriftier plan and where to go on; raises ResourceError where that is not wanted."""
    on_gpu = outcome.fused and setting.device.kind == "cuda"
    plan = smaller(setting.plan, offload=on_gpu and _host_holds(setting))
    if plan is None or recipe.training.on_oom == "stop":
        raise out_of_memory(setting, folder, outcome.step, _what_it_took(setting))
    before, step = setting.plan, int((outcome.checkpoint or Path("0")).name.rpartition("-")[2])
    tell(
        Warned(
            f"out of memory at step {outcome.step + 1} with "
            f"{counted(before.micro_batch_size, 'row')} at a time; going on after step {step} with "
            f"{plan.micro_batch_size} x {plan.accumulation}"
            f"{_mode(before, plan)}"
        )
    )
    change: dict[str, int | str]
    change = {"step": step, "from": before.micro_batch_size, "to": plan.micro_batch_size}
    if plan.mode != before.mode:
        change["checkpointing"] = plan.mode
    ground.manifest["plan"] = asdict(plan)
    ground.manifest["shrunk"] = [*ground.manifest.get("shrunk", []), change]
    folder.write_manifest(ground.manifest)
    return replace(setting, plan=plan), outcome.checkpoint


def _mode(before: Plan, plan: Plan) -> str:
    return "" if plan.mode == before.mode else f", checkpointing {plan.mode}"


def _what_it_took(setting: Setting) -> Estimate | None:
    """The estimate of the plan that ran, with the cheapest changes."""
    if setting.device.kind != "cuda" or setting.architecture.other_layers is not None:
        return None
    return _estimated(setting, setting.plan.mode, advise=True)


def _host_holds(setting: Setting) -> bool:
    """Whether the machine could take the layers' inputs of the plan that ran."""
    return host_holds(_estimated(setting, "offload").memory)


def _estimated(setting: Setting, mode: Mode, *, advise: bool = False) -> Estimate:
    chosen = {"micro_batch_size": setting.plan.micro_batch_size, "checkpointing": mode}
    training = setting.seen.training.model_copy(update=chosen)
    ran = setting.seen.model_copy(update={"training": training})
    return on_this_gpu(ran, setting.device, setting.architecture, setting.rows, advise=advise)
