"""Merge adapters into their base: check, stream, prove, verify, publish."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from peftcli.errors import ArtefactError, ResourceError
from peftcli.estimate.merging import WORKERS, writing_bytes
from peftcli.merge.bring import has_tokenizer
from peftcli.merge.compute import held_whole, single_threaded
from peftcli.merge.finish import finish, free_memory
from peftcli.merge.identity import check_output
from peftcli.merge.options import MergeOptions, WeightedAdapter
from peftcli.merge.prepare import Inputs, Prepared, locate, prepare
from peftcli.merge.result import MergeResult, size
from peftcli.merge.source import AdapterSource
from peftcli.merge.stream import write_weights
from peftcli.models import go_offline
from peftcli.run_dir import RunDir, locked

Tell = Callable[[str], None]
SPARE_BYTES = 64 << 20  # tokenizer, config, card
SECONDS_BETWEEN = 5.0  # of progress lines


def run(source: Path | None, options: MergeOptions, tell: Tell) -> MergeResult:
    """Merge the adapter at `source`, and those of `options.adapters`, into their base.

    Nothing appears at the output before it is complete and verified. Raises UsageError,
    ArtefactError, ResourceError or NumericalError with what to do.
    """
    started = time.monotonic()
    _quiet()
    if options.offline:
        go_offline()
    named = () if source is None else (WeightedAdapter(source),)
    inputs = locate((*named, *options.adapters), options)
    output = options.output or _default_output(inputs.sources[0])
    check_output(output, inputs.sources, inputs.base, overwrite=options.overwrite)
    output = output.resolve() if output.is_symlink() else output  # the link stays
    _check_export(inputs, options)
    with single_threaded():
        prepared = prepare(inputs, options, tell)
    for text in prepared.warnings:
        tell(f"warning: {text}")
    with _staging(output) as staging:
        _check_space(output, prepared, tell)
        _check_memory(prepared)
        rounding = write_weights(prepared.plan, staging, prepared.arithmetic, _progress(tell))
        return finish(prepared, options, staging, output, rounding, started, tell)


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A locked, empty folder beside the output, which is gone when anything fails."""
    folder = output.with_name(f".staging-{output.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"--output {output}: cannot be written: {error.strerror}", "name another folder"
        ) from None
    with locked(RunDir(folder)):
        for left in folder.iterdir():  # by a merge that was killed
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _default_output(source: AdapterSource) -> Path:
    if source.run is not None:
        return source.run.path / "merged"
    if "snapshots" in source.folder.parts:  # the hub's cache is no place for results
        return Path(f"{source.name.rpartition('/')[2]}-merged")
    return source.folder.with_name(f"{source.folder.name}-merged")


def _check_export(inputs: Inputs, options: MergeOptions) -> None:
    folders = (inputs.sources[0].folder, inputs.base.folder)
    if options.export == "ollama" and not any(map(has_tokenizer, folders)):
        raise ArtefactError(
            f"--export ollama: no tokenizer in {folders[0]} or {folders[1]}, so neither template "
            "nor stop tokens are known",
            "put the tokenizer's files beside the base, or leave the option away",
        )


def _check_space(output: Path, prepared: Prepared, tell: Tell) -> None:
    needed = prepared.plan.bytes + SPARE_BYTES
    free = shutil.disk_usage(output.parent).free
    before = sum(item.source.bytes for item in prepared.plan.items if not item.added)
    tell(
        f"writing {size(prepared.plan.bytes)} to {output} (the base has {size(before)}, "
        f"{size(free)} are free)"
    )
    if needed > free:
        raise ResourceError(
            f"{output.parent}: {size(needed)} are needed, {size(free)} are free",
            "free some space, or name another disk with --output",
        )


def _check_memory(prepared: Prepared) -> None:
    """Refuse what the system would end half-way; the adapter is in memory already."""
    whole, coded = [0], [0]
    for item in prepared.plan.items:
        if held_whole(item, prepared.arithmetic):
            whole.append(math.prod(item.shape))
        elif item.dequantized:
            coded.append(math.prod(item.shape))
    largest = sum(sorted(coded)[-WORKERS:])
    needed = int(writing_bytes(coded=largest, whole=max(whole)))
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise ResourceError(
            f"merging takes about {size(needed)} of memory, {size(free)} are free",
            "end other programs, or use a larger machine",
        )


def _progress(tell: Tell) -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN:
            last = now
            tell(f"written {size(done)} of {size(total)}")

    return report


def _quiet() -> None:
    """What users should know reaches them through `tell`; the libraries' chatter is cut."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate)")
