"""Standard benchmarks through lm-evaluation-harness, on the model that is loaded already.

The model is handed over as it is: nothing is reloaded, resized or requantised, so a padded
vocabulary stays padded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from peftcli.errors import UsageError
from peftcli.evaluate.compare import Measured
from peftcli.evaluate.score import AnyModel
from peftcli.metrics import Metric, Statistics, mean


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task: what the harness reports, and its value for each document."""

    name: str
    value: float
    documents: dict[str, float]


def run_tasks(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    stops: Sequence[int],
    *,
    limit: int | None,
    seed: int,
    batch_size: int,
) -> list[TaskResult]:
    """Every metric of every task; UsageError for tasks that the harness does not know."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, names = _manager(tasks)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    with _stopping(model, stops):
        results = simple_evaluate(
            model=lm,
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    found = []
    for task, values in results["results"].items():
        samples = results["samples"].get(task, [])
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                shown = f"{task} {metric}" + (f" ({kind})" if kind not in ("", "none") else "")
                found.append(TaskResult(shown, value, _documents(samples, metric, kind)))
    return found


def task_scores(results: dict[str, list[TaskResult]]) -> list[Measured]:
    """Arm -> results, as rows to compare; metrics without a value for each document are left."""
    arms = list(results)
    measured = []
    for result in results[arms[0]]:
        by_arm = {arm: _named(results[arm], result.name) for arm in arms}
        keys = tuple(result.documents)
        if not keys or any(set(one.documents) != set(keys) for one in by_arm.values()):
            continue
        rows: dict[str, list[Statistics]] = {
            arm: [(one.documents[key], 1.0) for key in keys] for arm, one in by_arm.items()
        }
        values = {row[0] for of in rows.values() for row in of}
        metric = Metric(result.name, lambda a, b: (), mean, binary=values <= {0.0, 1.0})
        if all(
            abs(sum(row[0] for row in rows[arm]) / len(keys) - one.value) < 1e-6
            for arm, one in by_arm.items()
        ):
            measured.append(Measured(metric, keys, rows))
    return measured


@contextmanager
def _stopping(model: AnyModel, stops: Sequence[int]) -> Iterator[None]:
    """Let the model also end at the stop tokens of its training.

    The harness cuts at stop strings after special tokens are gone from the text.
    """
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    model.generation_config = copy.deepcopy(own)
    known = [end for end in (*ends, *stops) if end is not None]
    model.generation_config.eos_token_id = list(dict.fromkeys(known))
    try:
        yield
    finally:
        model.generation_config = own


def _manager(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's tasks, with local YAML files among them."""
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UsageError(f"--tasks: {file}: no such file", "name a task or its YAML file")
    folders = sorted({str(file.parent.absolute()) for file in files})
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))
    names = [_task_name(task) for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        near = [name for name in manager.all_tasks if unknown[0].split("_")[0] in name][:5]
        raise UsageError(
            f"--tasks: lm-evaluation-harness has no task {unknown[0]}",
            f"near it: {', '.join(near)}" if near else "list them: lm-eval ls tasks",
        )
    return manager, names


def _task_name(task: str) -> str:
    if not task.endswith((".yaml", ".yml")):
        return task
    for line in Path(task).read_text("utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == "task":
            return value.strip().strip("'\"")
    raise UsageError(f"--tasks: {task} has no line `task: NAME`", "add it")


def _documents(samples: Sequence[dict[str, Any]], metric: str, kind: str) -> dict[str, float]:
    found = {}
    for sample in samples:
        if sample.get("filter", kind) == kind and isinstance(sample.get(metric), int | float):
            found[str(sample["doc_id"])] = float(sample[metric])
    return found


def _named(results: Sequence[TaskResult], name: str) -> TaskResult:
    return next(one for one in results if one.name == name)
