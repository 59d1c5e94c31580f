"""Everything that can be refused before torch is imported and a model is loaded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from peftcli.data.check import Checked, check_source
from peftcli.data.sources import Source, check_exist
from peftcli.errors import DataError, ResourceError, UsageError
from peftcli.evaluate.against import read_report
from peftcli.evaluate.choices import has_choices, read_choices
from peftcli.evaluate.options import EvalOptions, completed
from peftcli.evaluate.target import Target, check_base, find_target, local_base
from peftcli.metrics import Metric, check_installed, find_metric, function_metric
from peftcli.recipe.schema import Data
from peftcli.recipe.schema import Source as RecipeSource


def check(source: Path, options: EvalOptions) -> Target:
    """The target of an evaluation that can start; raises PeftcliError with what is wrong."""
    if options.metric_function:
        load_function(options.metric_function)
    if options.tasks and not find_spec("lm_eval"):
        raise ResourceError("--tasks needs lm-evaluation-harness", "pip install 'peftcli[lm-eval]'")
    if options.against is not None:
        read_report(options.against)
    target = find_target(source, output=options.output, base=options.base_model)
    options = completed(options, target)
    metrics = [find_metric(name) for name in (*options.metrics, *options.gates.fail_under)]
    check_installed(metrics)
    _check_arms(target, options)
    _check_rows(target, options)
    check_base(target, local_base(target))
    return target


def load_function(spec: str) -> Metric:
    """`module:function` from the current folder or the installed packages, as a metric."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise UsageError(f"--metric-function {spec}: not MODULE:FUNCTION", "such as scores:dates")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError as error:
        raise UsageError(f"--metric-function {spec}: {error}", "run from its folder") from None
    if not callable(found):
        raise UsageError(f"--metric-function {spec}: {module} has no function {name}", "check it")
    return function_metric(name, found)


def asked_sources(paths: Sequence[str], data: Data | None) -> tuple[RecipeSource, ...]:
    """Files of rows to ask, read as the recipe reads its own or, where that fails, by content.

    Raises DataError for files that are missing, empty, or whose first rows have no answer.
    """
    return tuple(_asked_source(path, data) for path in paths)


def _asked_source(path: str, data: Data | None) -> RecipeSource:
    labels = data.labels if data is not None else None
    plain = RecipeSource(path=path, format="auto", columns={}, labels=labels)
    if has_choices(path, Path.cwd()):
        read_choices(path, Path.cwd())
        return plain
    own = plain
    if data is not None:
        own = plain.model_copy(update={"format": data.format, "columns": data.columns})
    checked = _checked(own)
    if checked is None and own != plain:
        own, checked = plain, _checked(plain)
    if checked is None:
        checked = check_source(_light(own), Path.cwd())
    if checked.bad:
        lines = "\n".join(f"  {line}" for line in checked.problems)
        raise DataError(
            f"{path}: {checked.bad} of the first {checked.rows} rows are bad:\n{lines}",
            "every row needs a question and a reference answer",
        )
    return own


def _checked(source: RecipeSource) -> Checked | None:
    """The check of the first rows; None where not one can be read that way."""
    try:
        checked = check_source(_light(source), Path.cwd())
    except DataError:
        return None
    return None if checked.bad == checked.rows else checked


def _light(source: RecipeSource) -> Source:
    return Source(
        source.path, format=source.format or "auto", columns=source.columns, labels=source.labels
    )


def _check_arms(target: Target, options: EvalOptions) -> None:
    gates = options.gates
    if gates.max_merge_drift is not None and (target.merged is None or target.adapter is None):
        raise UsageError(
            f"--max-merge-drift: {target.source} has no merged model", "run `peftcli merge` first"
        )
    single = target.adapter is None and target.tuned is None
    for value, name in (
        (gates.min_gain, "--min-gain"),
        (gates.max_forgetting, "--max-forgetting"),
    ):
        if value is not None and single:
            raise UsageError(
                f"{name}: {target.source} is one model, so there is nothing to compare it with",
                "name a run or an adapter",
            )
    if gates.max_forgetting is not None and options.retain == ():
        raise UsageError("--max-forgetting needs retained text", "name files with --retain")


def _check_rows(target: Target, options: EvalOptions) -> None:
    data = target.loaded.recipe.data if target.loaded is not None else None
    if options.data:
        asked_sources(options.data, data)
    elif target.loaded is None:
        raise UsageError(
            f"{target.source}: a {target.kind} has no rows of its own to be asked",
            "name a file with questions and answers: --data FILE",
        )
    elif data is not None:
        if data.eval is None:
            raise UsageError(
                f"{target.source}: its recipe holds out no rows (data.eval: null)",
                "name a file with questions and answers: --data FILE",
            )
        check_exist(data.paths(), Path.cwd())
    check_exist(options.retain or (), Path.cwd())
