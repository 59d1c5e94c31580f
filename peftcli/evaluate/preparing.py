"""Rows as training prepares them: the same tokens, from the same cache, checked for leakage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from peftcli.data.report import DataReport
from peftcli.data.sources import check_exist
from peftcli.dataset import Prepared, prepare
from peftcli.errors import DataError
from peftcli.evaluate.check import asked_sources
from peftcli.evaluate.options import EvalOptions
from peftcli.evaluate.target import Target
from peftcli.recipe.schema import Data, Source
from peftcli.run_dir import cache_folder
from peftcli.untrusted import read_object


def prepared_rows(
    target: Target, options: EvalOptions, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[Prepared, int | None, list[str]]:
    """The rows, how many of them were training rows (and are left out), and remarks."""
    if target.loaded is None:
        notes = ["training rows are not known, so leakage could not be checked"]
        return prepared_files(data, tokenizer, 0, "--data"), None, notes
    seed = target.loaded.recipe.seed
    if options.data:
        # Reading the training rows too is what finds leaked ones.
        asked = data.model_copy(
            update={"eval": asked_sources(options.data, data), "overlap": "drop"}
        )
        try:
            check_exist([source.path for source in data.train], Path.cwd())
        except DataError:
            alone = data.model_copy(update={"train": asked.eval, "eval": None, "limit": None})
            notes = ["the training rows are not here, so leakage could not be checked"]
            return prepared_files(alone, tokenizer, seed, "--data"), None, notes
    else:
        asked = data if data.overlap != "allow" else data.model_copy(update={"overlap": "drop"})
    prepared = prepared_files(asked, tokenizer, seed, "")
    changed = _changed_files(target, prepared.report)
    if changed and not options.data:
        raise DataError(
            f"{target.source}: {', '.join(changed)} changed since the run, so rows that are held "
            "out now may have been trained on",
            "restore the files, or name rows that the run never saw: --data FILE",
        )
    notes = [f"{', '.join(changed)} changed since the run"] if changed else []
    leaked = prepared.report.eval.overlap if prepared.report.eval else 0
    return prepared, leaked, notes


def prepared_files(
    data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, shown: str
) -> Prepared:
    try:
        return prepare(
            data,
            tokenizer,
            base_dir=Path.cwd(),
            cache_dir=cache_folder() / "prepared",
            seed=seed,
        )
    except DataError as error:
        message = error.message.replace("data.train", shown) if shown else error.message
        raise DataError(message, error.hint) from None


def generation_stops(
    target: Target, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> tuple[int, ...]:
    """The tokens that end an answer: those of the template, the tokenizer and the tuned model."""
    stops = [*ends, int(tokenizer.eos_token_id)]
    for folder in (target.adapter, target.tuned):
        file = folder / "generation_config.json" if folder is not None else None
        if file is not None and file.is_file():
            own = read_object(file).get("eos_token_id")
            stops += own if isinstance(own, list) else [own] if isinstance(own, int) else []
    return tuple(dict.fromkeys(stops))


def sources_named(paths: Sequence[str]) -> tuple[Source, ...]:
    return tuple(Source(path=path) for path in paths)


def _changed_files(target: Target, report: DataReport) -> list[str]:
    """Training files whose content is not that of the run."""
    if target.manifest is None:
        return []
    files = target.manifest.get("data", {}).get("files", [])
    then = {file["path"]: file["sha256"] for file in files if file.get("split") == "train"}
    now = {file.path: file.sha256 for file in report.files if file.split == "train"}
    return sorted(path for path in {**then, **now} if then.get(path) != now.get(path))
