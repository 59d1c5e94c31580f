"""Rows of random tokens, as a run would find them after its own rows were prepared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from peftcli.architecture.shapes import Architecture
from peftcli.data.report import DataReport, SplitReport
from peftcli.dataset import Prepared
from peftcli.estimate.compare import PACKED_ROWS
from peftcli.estimate.plan import Mode
from peftcli.estimate.result import Rows
from peftcli.models import Device
from peftcli.recipe.checks import rows_apart
from peftcli.recipe.schema import Recipe
from peftcli.train.plan import Load, decide
from peftcli.train.setting import Setting, pack


@dataclass(frozen=True)
class Shape:
    """How much goes through the model at a time."""

    tokens_per_row: int
    micro_batch_size: int
    mode: Mode
    """What checkpointing is."""
    packing: bool


def random_setting(
    recipe: Recipe,
    architecture: Architecture,
    device: Device,
    tokenizer: PreTrainedTokenizerBase,
    shape: Shape,
    steps: int,
) -> Setting:
    """What `settle` makes of a recipe's rows, for rows of random tokens."""
    training = recipe.training.model_copy(
        update={"max_steps": steps, "save_steps": None, "report_to": ()}
    )
    data = recipe.data.model_copy(update={"eval": None})
    recipe = recipe.model_copy(update={"training": training, "data": data})
    apart = rows_apart(recipe, architecture)
    count = training.batch_size * steps
    rows = _rows(shape, architecture.vocab_size, count, even=apart)
    load = Load(shape.micro_batch_size, shape.mode, ())
    plan = decide(recipe, rows=len(rows), has_eval=False, packing=shape.packing, load=load)
    return Setting(
        architecture=architecture,
        device=device,
        tokenizer=tokenizer,
        prepared=Prepared(rows, None, _report(rows, architecture.vocab_size)),
        train=rows,
        eval=None,
        plan=plan,
        estimate=None,
        trainable=recipe.method.trainable_parameters(architecture),
        varlen=apart,
        max_length=shape.tokens_per_row,
        longest=shape.tokens_per_row,
        seen=recipe,
        rows=Rows(len(rows), shape.tokens_per_row, float(shape.tokens_per_row)),
    )


def _rows(shape: Shape, vocabulary: int, count: int, *, even: bool) -> Dataset:
    """Rows of random tokens.

    Where they would be padded, one of each micro-batch has the full length and the others a token
    less: real rows are never equal, and padding changes the kernel.
    """
    length, generator = shape.tokens_per_row, torch.Generator().manual_seed(0)
    shorter = [not even and i % shape.micro_batch_size > 0 for i in range(count)]
    lengths = [length - less for less in shorter]
    if shape.packing:
        lengths = [length // PACKED_ROWS] * (PACKED_ROWS * count)
    rows = []
    for size in lengths:
        tokens = torch.randint(0, vocabulary, (size,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": tokens})
    made = Dataset.from_list(rows)
    return pack(made, length) if shape.packing else made


def _report(rows: Dataset, vocabulary: int) -> DataReport:
    lengths = [len(row) for row in rows["input_ids"]]
    longest = max(lengths)
    split = SplitReport(
        read=len(lengths),
        bad=0,
        too_long=0,
        truncated=0,
        answer_cut=0,
        untrained=0,
        duplicates=0,
        overlap=0,
        kept=len(lengths),
        tokens=sum(lengths),
        trained_tokens=sum(lengths),
        length_p50=longest,
        length_p90=longest,
        length_p99=longest,
        length_max=longest,
    )
    return DataReport(split, None, (), "none", (), vocabulary - 1)
