"""`train --dry-run`: what a run would do, with the labels made visible; trains nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftcli.data.report import SplitReport
from peftcli.dataset import samples
from peftcli.events import Listener
from peftcli.models import go_offline
from peftcli.recipe.load import LoadedRecipe, leaves, resolved
from peftcli.train.opening import check_place
from peftcli.train.quiet import quiet_libraries
from peftcli.train.refusals import check_trackers
from peftcli.train.setting import Setting, settle
from peftcli.words import counted

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
    trainable_parameters: int | None
    """None, like the next, where only the loaded model tells."""
    parameters: int | None
    report: dict[str, Any]
    warnings: list[str]


def dry_run(loaded: LoadedRecipe, tell: Listener, *, offline: bool) -> DryRun:
    """Prepare the rows and decide the plan; raises what `run` would raise up to there.

    A folder that holds a run already is none of that: it may be looked at beside it.
    """
    check_place(Path(loaded.recipe.output))
    check_trackers(loaded.recipe.training.report_to)
    quiet_libraries()
    if offline:
        go_offline()
    setting = settle(loaded, tell)
    known = setting.architecture.other_layers is None
    total = setting.architecture.parameters() if known else None
    return DryRun(
        values=resolved_values(loaded, setting.max_length),
        rows=_row_lines(setting, loaded),
        samples=samples(setting.prepared, setting.tokenizer, SHOWN_ROWS),
        plan=_plan_lines(setting, total),
        trainable_parameters=setting.trainable if known else None,
        parameters=total,
        report=setting.prepared.report.to_dict(),
        warnings=[*loaded.recipe.warnings(), *setting.prepared.report.warnings],
    )


def resolved_values(loaded: LoadedRecipe, max_length: int) -> list[tuple[str, str, str]]:
    """Every key of the recipe, its value as YAML would write it, and where it comes from.

    `max_length` is the longest row of the run.
    """
    listed = []
    for path, value in leaves(resolved(loaded.recipe)):
        origin = loaded.origin(path)
        by_method = path in (("training", "learning_rate"), ("training", "optimizer"))
        if origin == "default" and by_method:
            origin = f"default of {loaded.recipe.method.name}"
        if path == ("data", "max_length") and value != max_length:
            value, origin = max_length, f"positions of the model; the default is {value}"
        listed.append((".".join(map(str, path)), json.dumps(value, ensure_ascii=False), origin))
    return listed


def _row_lines(setting: Setting, loaded: LoadedRecipe) -> list[str]:
    report, data = setting.prepared.report, loaded.recipe.data
    lines = [f"{file.path}: {file.format} rows ({file.why})" for file in report.files]
    if any(file.format != "text" for file in report.files):
        lines.append(f"chat template: {report.template}")
    splits = [report.train] if report.eval is None else [report.train, report.eval]
    lines.append(_counted("", ["train", "eval"][: len(splits)]))
    names = {
        "read": "read",
        "kept": "kept",
        "bad": "bad",
        "too_long": f"longer than {setting.max_length:,} tokens",
        "truncated": "  of these truncated",
        "split": "  of these split into several rows",
        "answer_cut": "  of these left out, no answer left",
        "untrained": "left out, nothing to train on",
        "duplicates": f"duplicates ({'kept' if data.duplicates == 'keep' else 'left out'})",
        "overlap": f"in both ({'kept' if data.overlap == 'allow' else 'left out of eval'})",
        "weighed": "more by weight, less below zero",
        "limited": "left out by data.limit",
        "tokens": "tokens",
        "trained_tokens": "  trained on",
        "length_p50": "length: median",
        "length_p90": "  90 % are at most",
        "length_p99": "  99 % are at most",
        "length_max": "  longest",
    }
    for key in ("weighed", "limited"):
        if not asdict(report.train)[key]:
            del names[key]
    lines += [
        _counted(text, [_shown(split, key) for split in splits]) for key, text in names.items()
    ]
    return lines + [f"warning: {text}" for text in (*loaded.recipe.warnings(), *report.warnings)]


def _counted(name: str, values: list[str]) -> str:
    return f"{name:36}" + "".join(f"{value:>14}" for value in values)


def _shown(split: SplitReport, key: str) -> str:
    """A count; none for what was counted among the training rows, of which this is a share."""
    of_files = key in ("read", "bad", "too_long", "truncated", "split", "answer_cut", "untrained")
    counts = asdict(split)
    return "" if of_files and not split.read else f"{counts[key]:,}"


def _plan_lines(setting: Setting, total: int | None) -> list[str]:
    plan, device, trained = setting.plan, setting.device, setting.trainable
    share = f"{trained:,} trained, {trained / total:.2%} of {total:,}" if total else "not known yet"
    return [
        f"device: {device.name}, {device.dtype}",
        f"parameters: {share}",
        f"steps: {plan.steps}, warm-up {plan.warmup_steps}, evaluation every {plan.eval_steps}, "
        f"checkpoint every {plan.save_steps}",
        f"batch: {counted(plan.micro_batch_size, 'row')} x {plan.accumulation} accumulation",
        f"checkpointing: {plan.mode}, packing: {'on' if plan.packing else 'off'}",
        *plan.reasons,
    ]
