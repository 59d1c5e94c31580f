"""Everything a run needs before the weights: checked architecture, tokenizer, rows, plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from peftcli.architecture.config import architecture_from
from peftcli.architecture.shapes import Architecture
from peftcli.dataset import Prepared, prepare
from peftcli.models import Device, choose_device, load_config, load_tokenizer
from peftcli.preparing.work import Progress
from peftcli.recipe.checks import check_architecture, longest_row
from peftcli.recipe.load import LoadedRecipe
from peftcli.run_dir import cache_folder
from peftcli.train.plan import Plan, decide, decide_packing


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
    trainable: int


def settle(loaded: LoadedRecipe, progress: Progress | None = None) -> Setting:
    """Check the recipe against its model and prepare the rows; loads no weights."""
    recipe = loaded.recipe
    device = choose_device(recipe.training.device, recipe.model.dtype)
    architecture = architecture_from(load_config(recipe.model).to_dict(), recipe.model.name)
    check_architecture(loaded, architecture)
    tokenizer = load_tokenizer(recipe.model)
    data = recipe.data.model_copy(update={"max_length": longest_row(loaded, architecture)})
    prepared = prepare(
        data,
        tokenizer,
        base_dir=Path.cwd(),
        cache_dir=cache_folder() / "prepared",
        seed=recipe.seed,
        progress=progress,
    )
    train, evaluation = prepared.train, prepared.eval
    plain_text = all(file.format == "text" for file in prepared.report.files)
    packing = decide_packing(recipe, plain_text)
    longest = prepared.report.train.length_max
    if packing:
        train = pack(train, data.max_length)
        evaluation = pack(evaluation, data.max_length) if evaluation is not None else None
        longest = data.max_length
    plan = decide(
        recipe,
        rows=len(train),
        longest=longest,
        plain_text=plain_text,
        on_gpu=device.kind == "cuda",
        has_eval=evaluation is not None,
    )
    return Setting(
        architecture=architecture,
        device=device,
        tokenizer=tokenizer,
        prepared=prepared,
        train=train,
        eval=evaluation,
        plan=plan,
        trainable=recipe.method.trainable_parameters(architecture),
    )


def pack(rows: Dataset, length: int) -> Dataset:
    """Several rows in each sequence of at most `length` tokens, best fit first; none is cut."""
    return pack_dataset(
        rows.select_columns(["input_ids", "labels"]), seq_length=length, strategy="bfd"
    )
