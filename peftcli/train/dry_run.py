"""`train --dry-run`: what a run would do, with the labels made visible; trains nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from peftcli.data.report import SplitReport
from peftcli.dataset import samples
from peftcli.models import go_offline
from peftcli.recipe.load import LoadedRecipe, leaves, resolved
from peftcli.train.quiet import quiet_libraries
from peftcli.train.setting import Setting, settle

SHOWN_ROWS = 3


@dataclass(frozen=True)
class DryRun:
    """Everything that is known before the weights are loaded."""

    values: list[tuple[str, str, str]]
    """Key, value and origin (file and line, --set, or default) of the resolved recipe."""
    rows: list[str]
    samples: list[list[tuple[str, bool]]]
    """Rendered rows in pieces, each with whether it is trained on."""
    plan: list[str]
    trainable_parameters: int
    parameters: int
    report: dict[str, Any]
    warnings: list[str]


def dry_run(loaded: LoadedRecipe, *, offline: bool) -> DryRun:
    """Prepare the rows and decide the plan; raises what `run` would raise up to there."""
    quiet_libraries()
    if offline:
        go_offline()
    setting = settle(loaded)
    total = setting.architecture.parameters()
    return DryRun(
        values=resolved_values(loaded),
        rows=_row_lines(setting),
        samples=samples(setting.prepared, setting.tokenizer, SHOWN_ROWS),
        plan=_plan_lines(setting, total),
        trainable_parameters=setting.trainable,
        parameters=total,
        report=setting.prepared.report.to_dict(),
        warnings=[*loaded.recipe.warnings(), *setting.prepared.report.warnings],
    )


def resolved_values(loaded: LoadedRecipe) -> list[tuple[str, str, str]]:
    """Every key of the recipe, its value as YAML would write it, and where it comes from."""
    listed = []
    for path, value in leaves(resolved(loaded.recipe)):
        origin = loaded.origin(path)
        by_method = path in (("training", "learning_rate"), ("training", "optimizer"))
        if origin == "default" and by_method:
            origin = f"default of {loaded.recipe.method.name}"
        listed.append((".".join(map(str, path)), json.dumps(value, ensure_ascii=False), origin))
    return listed


def _row_lines(setting: Setting) -> list[str]:
    report = setting.prepared.report
    lines = [f"{file.path}: {file.format} rows ({file.why})" for file in report.files]
    lines.append(f"chat template: {report.template}")
    lines += _split_lines("train", report.train)
    if report.eval is not None:
        lines += _split_lines("eval", report.eval)
    return lines + [f"warning: {text}" for text in report.warnings]


def _split_lines(name: str, split: SplitReport) -> list[str]:
    share = split.trained_tokens / max(1, split.tokens)
    read = f" of {split.read:,} read" if split.read else ", a share of the training rows"
    return [
        f"{name}: {split.kept:,} rows kept{read}; {split.bad} bad, "
        f"{split.too_long} too long, {split.truncated} truncated, {split.answer_cut} without an "
        f"answer after truncation, {split.untrained} with nothing to train on, "
        f"{split.duplicates} duplicate, {split.overlap} in both splits",
        f"{name}: {split.trained_tokens:,} of {split.tokens:,} tokens trained on ({share:.0%}); "
        f"lengths: median {split.length_p50}, 90 % {split.length_p90}, 99 % {split.length_p99}, "
        f"longest {split.length_max}",
    ]


def _plan_lines(setting: Setting, total: int) -> list[str]:
    plan, device = setting.plan, setting.device
    return [
        f"device: {device.name}, {device.dtype}",
        f"parameters: {setting.trainable:,} trained, {setting.trainable / total:.2%} of {total:,}",
        f"steps: {plan.steps}, warm-up {plan.warmup_steps}, evaluation every {plan.eval_steps}, "
        f"checkpoint every {plan.save_steps}",
        f"batch: {plan.micro_batch_size} rows x {plan.accumulation} accumulation",
        f"checkpointing: {plan.checkpointing}, packing: {plan.packing}",
        *plan.reasons,
    ]
