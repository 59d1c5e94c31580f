"""Evaluate a run, recipe, adapter or model: base | adapter | merged on the same rows."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from datasets import disable_progress_bars
from transformers import PreTrainedTokenizerBase

from peftcli import __version__
from peftcli.bundled import PREFIX, names
from peftcli.evaluate.arms import groups_of
from peftcli.evaluate.check import check
from peftcli.evaluate.generate import Decoding
from peftcli.evaluate.measure import LIBRARIES, Measuring
from peftcli.evaluate.options import EvalOptions, completed
from peftcli.evaluate.progress import Tell
from peftcli.evaluate.questions import Item
from peftcli.evaluate.report_html import html_report
from peftcli.evaluate.result import Evaluation
from peftcli.evaluate.rows import Asked, load_retained, load_rows
from peftcli.evaluate.scoring import scoring_of
from peftcli.evaluate.session import Session
from peftcli.evaluate.summary import Summary
from peftcli.evaluate.target import Target
from peftcli.events import Note
from peftcli.models import Device, choose_device, go_offline, load_tokenizer
from peftcli.recipe.schema import Model
from peftcli.run_dir import cache_folder, write_atomic

GENERAL = "general"
RETAINED_TOKENS = 512
LONGER = 1.25
"""Answers may be this much longer than the longest reference."""


def run(source: Path, options: EvalOptions, tell: Tell) -> Evaluation:
    """Measure, compare and judge; writes eval.json and report.html, raises what `check` raises.

    Gates are judged, not enforced: `gates.enforce` raises for a caller that wants the exit code.
    """
    started = time.perf_counter()
    target = check(source, options)
    options = completed(options, target)
    quiet_libraries()
    if options.offline:
        go_offline()
    device = device_of(target, options)
    tokenizer = load_tokenizer(tokenizer_source(target))
    asked = load_rows(target, options, tokenizer)
    scoring = scoring_of(asked, options)
    groups = groups_of(target, device)
    kept = retained_items(target, options, asked, tokenizer)
    decoding = decoding_of(asked, options, tokenizer)
    tell(Note(f"{asked.rows.held_out} rows, {asked.rows.answered} scored: {scoring.why}"))
    measuring = Measuring(
        device, cache_folder() / "evaluations", options.fresh, options.batch_tokens, tell
    )
    session = Session(asked, scoring, kept, decoding, measuring, options, tokenizer)
    found = session.collect(groups)
    settings = settings_of(device, decoding, asked, options)
    summary = Summary(target, options, asked, scoring, found, settings)
    return publish(summary.evaluation(time.perf_counter() - started), target.output)


def quiet_libraries() -> None:
    """What users should know reaches them as events; the rest of the chatter is cut."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate|datasets)")


def publish(evaluation: Evaluation, folder: Path) -> Evaluation:
    """Write eval.json and report.html, each at once."""
    folder.mkdir(parents=True, exist_ok=True)
    written = (folder / "eval.json", folder / "report.html")
    evaluation = replace(evaluation, written=written)
    write_atomic(written[0], json.dumps(evaluation.to_dict(), ensure_ascii=False) + "\n")
    write_atomic(written[1], html_report(evaluation))
    return evaluation


def device_of(target: Target, options: EvalOptions) -> Device:
    """Where and in what the models compute: as the recipe says, else as the options say."""
    if target.loaded is None:
        return choose_device(options.device, "auto")
    recipe = target.loaded.recipe
    return choose_device(recipe.training.device, recipe.model.dtype)


def tokenizer_source(target: Target) -> Model:
    """The base's tokenizer as in training; an adapter of somebody else may bring its own."""
    own = target.adapter
    if target.loaded is None and own is not None and (own / "tokenizer.json").is_file():
        return Model(name=str(own))
    return target.base


def decoding_of(asked: Asked, options: EvalOptions, tokenizer: PreTrainedTokenizerBase) -> Decoding:
    """Greedy decoding with the template's stops, long enough for the longest reference."""
    longest = max((len(item.answer) for item in asked.questions), default=0)
    return Decoding(
        max_new_tokens=options.max_new_tokens or max(16, round(LONGER * longest)),
        stops=asked.texts.stops,
        pad=int(tokenizer.pad_token_id),
        positions=asked.positions,
    )


def retained_items(
    target: Target, options: EvalOptions, asked: Asked, tokenizer: PreTrainedTokenizerBase
) -> Mapping[str, list[Item]]:
    """Text that should not be forgotten: the files named, or the bundled text."""
    if target.adapter is None and target.tuned is None:
        return {}
    sources = options.retain
    if sources is None:
        sources = (PREFIX + GENERAL,) if GENERAL in names() else ()
    longest = min(RETAINED_TOKENS, asked.positions or RETAINED_TOKENS)
    return {
        source: load_retained(source, options.retain_limit, asked, tokenizer, longest)
        for source in sources
    }


def settings_of(
    device: Device, decoding: Decoding, asked: Asked, options: EvalOptions
) -> dict[str, Any]:
    """What decides the figures, for the report."""
    stops = [asked.texts.tokenizer.decode([stop]) for stop in decoding.stops]
    return {
        "decoding": "greedy",
        "max_new_tokens": decoding.max_new_tokens,
        "stops": stops,
        "device": device.name,
        "dtype": device.dtype,
        "seed": options.seed,
        "resamples": options.resamples,
        "limit": options.limit,
        "options": {key: value for key, value in asdict(options).items() if key in SHOWN},
        "versions": {
            "peftcli": __version__,
            **{name: version(name) for name in LIBRARIES},
        },
    }


SHOWN = ("data", "metrics", "metric_function", "retain", "tasks", "task_limit", "gates")
