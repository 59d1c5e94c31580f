"""Everything a run needs before the weights: checked architecture, tokenizer, rows, plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from peftcli.architecture.config import architecture_from
from peftcli.architecture.shapes import Architecture
from peftcli.dataset import Prepared, prepare
from peftcli.estimate.gpus import GIB, device_gpu
from peftcli.estimate.result import Estimate, Rows
from peftcli.estimate.run import run as estimate_run
from peftcli.events import Listener, Warned
from peftcli.models import Device, choose_device, load_config, load_tokenizer
from peftcli.preparing.progress import tell_rows, told
from peftcli.recipe.checks import (
    check_architecture,
    longest_row,
    one_at_a_time,
    packs,
    rows_apart,
)
from peftcli.recipe.load import LoadedRecipe
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import cache_folder
from peftcli.train.memory import host_room_gib
from peftcli.train.plan import (
    Load,
    Plan,
    behind_a_mask,
    blind_load,
    cpu_load,
    decide,
    gpu_load,
    in_full,
    with_doubt,
)
from peftcli.train.precision import check_precision, misread_on_a_cpu


@dataclass(frozen=True)
class Setting:
    """The ground of a run."""

    architecture: Architecture
    device: Device
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    train: Dataset
    eval: Dataset | None
    plan: Plan
    estimate: Estimate | None
    """What the run needs of this GPU; None without one, or where it cannot be told."""
    trainable: int
    max_length: int
    """The most tokens a row may have."""
    longest: int
    """Tokens of the longest row there is."""
    varlen: bool
    """Whether rows lie end to end, kept apart by the attention kernel."""
    seen: Recipe
    """The recipe, with what the rows turned out to be."""
    rows: Rows

    def written(self, recipe: Recipe) -> Recipe:
        """The recipe with the row length that the model allows, so that it can be read again."""
        data = recipe.data.model_copy(update={"max_length": self.max_length})
        return recipe.model_copy(update={"data": data})


def settle(loaded: LoadedRecipe, tell: Listener) -> Setting:
    """Check the recipe against its model and prepare the rows; loads no weights."""
    recipe = loaded.recipe
    device = choose_device(recipe.training.device, recipe.model.dtype)
    check_precision(recipe, device)
    architecture = architecture_from(load_config(recipe.model).to_dict(), recipe.model.name)
    check_architecture(loaded, architecture)
    if doubt := misread_on_a_cpu(recipe, device, architecture):
        tell(Warned(doubt))
    tokenizer = load_tokenizer(recipe.model)
    data = recipe.data.model_copy(update={"max_length": longest_row(loaded, architecture)})
    prepared = prepare(
        data,
        tokenizer,
        base_dir=Path.cwd(),
        cache_dir=cache_folder() / "prepared",
        seed=recipe.seed,
        progress=told(tell),
    )
    report = prepared.report
    tell_rows(report, tell)
    if all(file.format == "text" for file in report.files):
        data = data.model_copy(update={"format": "text"})
    seen = recipe.model_copy(update={"data": data})
    packing = packs(seen, architecture)
    train, evaluation, rows = _sequences(prepared, data.max_length, packing=packing)
    known = device.kind == "cuda" and architecture.other_layers is None
    estimate = on_this_gpu(seen, device, architecture, rows) if known else None
    load = _load(recipe, device, estimate, rows, alone=one_at_a_time(seen, architecture))
    plan = decide(
        recipe,
        rows=len(train),
        has_eval=evaluation is not None,
        packing=packing,
        load=in_full(with_doubt(load, architecture), architecture.layers),
    )
    return Setting(
        architecture=architecture,
        device=device,
        tokenizer=tokenizer,
        prepared=prepared,
        train=train,
        eval=evaluation,
        plan=plan,
        estimate=estimate,
        trainable=recipe.method.trainable_parameters(architecture),
        max_length=data.max_length,
        longest=rows.longest or 1,
        varlen=rows_apart(recipe, architecture),
        seen=seen,
        rows=rows,
    )


def _load(
    recipe: Recipe, device: Device, estimate: Estimate | None, rows: Rows, *, alone: bool = False
) -> Load:
    """How much goes through the model at a time: by the estimate, where there is one.

    `alone` is one sequence at a time, whatever the device bears and the recipe says.
    """
    if alone and recipe.training.micro_batch_size != 1:
        training = recipe.training.model_copy(update={"micro_batch_size": 1})
        single = recipe.model_copy(update={"training": training})
        return behind_a_mask(_load(single, device, estimate, rows))
    if estimate is not None:
        return gpu_load(recipe, estimate)
    if device.kind == "cuda":
        return blind_load(recipe)
    return cpu_load(recipe, rows.longest or 1)


def _sequences(
    prepared: Prepared, length: int, *, packing: bool
) -> tuple[Dataset, Dataset | None, Rows]:
    """What goes through the model, in training and in evaluation, and how long it is."""
    train, held_out, report = prepared.train, prepared.eval, prepared.report.train
    if not packing:
        return train, held_out, Rows(len(train), report.length_max, report.tokens / report.kept)
    train = pack(train, length)
    held_out = pack(held_out, length) if held_out is not None else None
    return train, held_out, Rows(len(train), length, float(length))


def on_this_gpu(
    recipe: Recipe,
    device: Device,
    architecture: Architecture,
    rows: Rows,
    *,
    advise: bool = False,
) -> Estimate:
    """The estimate for this card, with what others hold on it now; changes always with `advise`."""
    free, total = torch.cuda.mem_get_info(0)
    gpu = device_gpu(device.name, total / GIB)
    held = max(0.0, total - free - torch.cuda.memory_reserved(0) - gpu.context) / GIB
    limit = recipe.training.memory_limit_gib
    if limit is not None and limit * GIB < free:
        gpu, held = replace(gpu, memory_mib=round(limit * 1024)), 0.0
    return estimate_run(
        recipe,
        gpu,
        rows=rows,
        architecture=architecture,
        reserved_gib=held,
        host_gib=host_room_gib(),
        always_advise=advise,
    )


def pack(rows: Dataset, length: int) -> Dataset:
    """Several rows in each sequence of at most `length` tokens, best fit first; none is cut."""
    return pack_dataset(
        rows.select_columns(["input_ids", "labels"]), seq_length=length, strategy="bfd"
    )
