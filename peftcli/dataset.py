"""The recipe's data section -> tokenised, masked data sets, made once and found again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from peftcli.data.report import DataReport, FileReport
from peftcli.errors import DataError
from peftcli.preparing.arrange import arrange
from peftcli.preparing.cache import is_whole, key_of, run_plan, staging
from peftcli.preparing.plan import choices_of, plan_parts, total_bytes
from peftcli.preparing.report import read_report, refuse, report_of
from peftcli.preparing.sources import limits_of
from peftcli.preparing.work import MASKED, Part, Plan, Progress, Work
from peftcli.recipe.schema import Data
from peftcli.rendering.choose import (
    NO_TURNS,
    added_tokens,
    adds_begin,
    check_tokenizer,
    choose_template,
    learn_turns,
)
from peftcli.rendering.template import TemplateSource

# Below this many bytes, starting other processes takes longer than the work.
SMALL = 8 << 20


@dataclass(frozen=True)
class Prepared:
    """Data sets with the columns input_ids, labels (-100 where masked) and length."""

    train: Dataset
    eval: Dataset | None
    report: DataReport


def prepare(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_dir: Path,
    cache_dir: Path,
    seed: int,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Read, check, render, tokenise and mask the rows of a recipe, or find them in the cache.

    The tokenizer is given the chat template when it has none. Raises DataError with the first
    ten bad rows as FILE:LINE, and ArtefactError for a template that cannot be trained with.
    """
    check_tokenizer(tokenizer)
    parts, files = plan_parts(data, base_dir)
    other = next((file for file in files if file.format != "text"), None)
    if data.too_long == "split" and other is not None:
        raise DataError(
            f"data.too_long: `split` is for plain text, and {other.path} holds {other.format} rows",
            "write `auto`, `truncate`, `drop` or `error`",
        )
    template = choose_template(tokenizer, data.chat_template, base_dir)
    work, stops = _work(data, tokenizer, template, parts)
    spread = workers or (1 if total_bytes(parts) < SMALL else len(os.sched_getaffinity(0)))
    plan = Plan(work, tuple(parts), limits_of(data), spread)
    key = _key(data, work, files, seed)
    cached = is_whole(cache_dir / key)
    if not cached:
        with staging(cache_dir, key) as folder:
            rows = run_plan(plan, folder, progress or (lambda share, rows: None))
            refuse(rows, data)
            arranged = arrange(rows, choices_of(data, seed))
            np.save(folder / "train.npy", arranged.train)
            if arranged.eval is not None:
                np.save(folder / "eval.npy", arranged.eval)
            report = report_of(rows, arranged, files, template.origin, stops, data)
            about = {"report": report.to_dict(), "eval_split": arranged.eval_split}
            (folder / "about.json").write_text(json.dumps(about), "utf-8")
    return _load(cache_dir / key, cached)


def samples(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[list[tuple[str, bool]]]:
    """The first `count` training rows as pieces of text, each with whether it is trained on."""
    shown = []
    for row in prepared.train.select(range(min(count, len(prepared.train)))):
        ids, labels = row["input_ids"], row["labels"]
        trained = [label != MASKED for label in labels]
        edges = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
        texts = [tokenizer.decode(ids[:end]) for end in edges]
        pieces = zip(texts, texts[1:], edges, strict=False)
        shown.append([(after[len(before) :], trained[edge]) for before, after, edge in pieces])
    return shown


def _work(
    data: Data, tokenizer: PreTrainedTokenizerBase, template: TemplateSource, parts: list[Part]
) -> tuple[Work, tuple[int, ...]]:
    """What the processes need, and the ids of the tokens that end a generation."""
    turns = NO_TURNS
    stops: tuple[int, ...] = (int(tokenizer.eos_token_id),)
    if any(part.form.name != "text" for part in parts):
        turns, stops = learn_turns(tokenizer, template)
    begin = (tokenizer.bos_token, tokenizer.bos_token_id) if adds_begin(tokenizer) else None
    work = Work(
        tokenizer=tokenizer.backend_tokenizer.to_str(),
        template=template,
        turns=turns,
        added=added_tokens(tokenizer, template),
        train_on=data.train_on,
        system=data.system,
        max_length=data.max_length,
        too_long=data.too_long,
        begin=begin,
        end=(tokenizer.eos_token, tokenizer.eos_token_id),
        unknown=tokenizer.unk_token_id,
        stop_at_bad=data.bad_rows == "error",
    )
    return work, stops


def _key(data: Data, work: Work, files: Sequence[FileReport], seed: int) -> str:
    """The name of the prepared rows in the cache: everything that they depend on."""
    # A template from a tokenizer that was given it before is the same template.
    template = replace(work.template, origin="")
    known = replace(work, tokenizer=_sha256(work.tokenizer), template=template)
    return key_of(
        {
            "files": [asdict(file) for file in files],
            "data": data.model_dump(mode="json"),
            "work": asdict(known),
            "seed": seed,
        }
    )


def _load(folder: Path, cached: bool) -> Prepared:
    about = json.loads((folder / "about.json").read_text("utf-8"))
    report = replace(read_report(about["report"]), cached=cached)
    held = None
    if (folder / "eval.npy").exists():
        held = _chosen(folder / f"{about['eval_split']}.arrow", folder / "eval.npy")
    return Prepared(_chosen(folder / "train.arrow", folder / "train.npy"), held, report)


def _chosen(rows: Path, index: Path) -> Dataset:
    every, chosen = Dataset.from_file(str(rows)), np.load(index)
    if len(chosen) == len(every) and bool((chosen == np.arange(len(every))).all()):
        return every
    return every.select(chosen)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
