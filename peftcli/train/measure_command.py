"""`peftcli estimate --measure`: the estimate of this GPU beside what two steps on it took."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from peftcli.errors import ResourceError
from peftcli.estimate.command import Choices, Subject, subject_of
from peftcli.estimate.compare import compare, show_comparison
from peftcli.estimate.result import Estimate
from peftcli.models import Device, choose_device, load_tokenizer
from peftcli.recipe.load import LoadedRecipe
from peftcli.train.measure import Measured, measure
from peftcli.train.quiet import quiet_libraries
from peftcli.train.random_rows import Shape
from peftcli.train.setting import on_this_gpu
from peftcli.words import counted


def measure_recipe(loaded: LoadedRecipe, choices: Choices) -> None:
    """Print predicted beside measured; raises ResourceError without a GPU or where it is full."""
    subject = subject_of(loaded, choices)
    if choices.gpu is not None:
        raise ResourceError(
            f"--measure runs on the GPU of this machine, not on --gpu {choices.gpu}",
            "leave --gpu away",
        )
    if not torch.cuda.is_available():
        raise ResourceError(
            "--measure: PyTorch sees no GPU here",
            "run it on a machine with one; without --measure no GPU is needed",
        )
    quiet_libraries()
    device = choose_device("cuda", loaded.recipe.model.dtype)
    estimate = on_this_gpu(loaded.recipe, device, subject.architecture, subject.rows)
    found = _measured(subject, device, estimate)
    lines = compare(estimate, asdict(found))
    if choices.as_json:
        values = {"estimate": asdict(estimate), "measured": asdict(found)}
        print(json.dumps(values | {"compared": [asdict(line) for line in lines]}, indent=2))
    else:
        show_comparison(estimate, lines)


def _measured(subject: Subject, device: Device, estimate: Estimate) -> Measured:
    recipe, settings = subject.loaded.recipe, estimate.settings
    tokenizer = load_tokenizer(recipe.model)
    try:
        return measure(recipe, subject.architecture, device, tokenizer, shape_of(estimate))
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated() / 2**30
        raise ResourceError(
            f"{device.name} ran out of memory at {peak:.1f} GiB: "
            f"{counted(settings.micro_batch_size, 'row')} of {settings.tokens_per_row:,} tokens, "
            f"where the estimate says {estimate.memory.likely_gib:.1f} GiB",
            "lower training.micro_batch_size or data.max_length, and measure again",
        ) from None


def shape_of(estimate: Estimate) -> Shape:
    """What goes through the model at a time, as it was estimated."""
    settings = estimate.settings
    return Shape(
        tokens_per_row=settings.tokens_per_row,
        micro_batch_size=settings.micro_batch_size,
        mode=settings.checkpointing,
        packing=settings.packing,
    )
