"""A merge's result -> the terminal or JSON."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from peftcli.merge.result import MergeResult, size
from peftcli.merge.servable import Servability

if TYPE_CHECKING:
    from rich.table import Table


def show_merge(result: MergeResult, *, as_json: bool) -> None:
    """What was merged into what, how exact it is, and where it lies."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False, default=str))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in _facts(result):
        console.print(line, markup=False)
    if result.verification is not None:
        console.print(_distances(result))
    for text in result.warnings:
        console.print(f"warning: {text}", style="yellow", markup=False)
    for text in result.exported:
        console.print(f"exported: {text}", markup=False)
    console.print(
        f"done: {result.output} ({size(result.bytes)}) in {result.seconds:.1f} s, "
        f"peak {result.peak_memory_gib:.2f} GiB",
        markup=False,
    )


def show_servable(answer: Servability, *, as_json: bool) -> None:
    """Whether vLLM serves the adapter unmerged, and with which flags."""
    if as_json:
        print(json.dumps(vars(answer), indent=2))
        return
    if answer.servable:
        print("vLLM can serve this adapter unmerged:")
        print("  vllm serve BASE " + shlex.join(answer.flags))
    else:
        print("vLLM cannot serve this adapter unmerged:")
        for reason in answer.reasons:
            print(f"  {reason}")
        print(answer.instead)
    for note in answer.notes:
        print(f"note: {note}")


def _facts(result: MergeResult) -> list[str]:
    base, precision = result.base, result.precision
    lines = [
        f"base        {base.name}, {base.kind} weights",
        f"changed     {result.tensors_changed} of {result.tensors} tensors",
        f"rounding    {precision.lost_share:.1%} of these weights kept their old value; "
        f"error {precision.relative_error:.2%} of the update",
    ]
    if result.combine:
        named = " + ".join(f"{weight:g} x {name}" for name, weight in result.adapters)
        part = f", keeping {result.density:g} of each" if result.density else ""
        lines.insert(1, f"adapters    {named}, {result.combine}{part}")
    if base.tensors_dequantized:
        bits = "8 bits" if base.quantization == "fp8" else "4 bits"
        lines.append(
            f"{bits}      {base.tensors_dequantized} tensors rounded to {base.quantization} first"
        )
    if result.untied:
        lines.append("embeddings  untied: embedding and output head differ now")
    if result.vocabulary is not None:
        lines.append(f"vocabulary  {result.vocabulary[0]} -> {result.vocabulary[1]} rows")
    if result.proof is not None:
        changed, kept = result.proof.changed, result.proof.kept
        lines.append(f"read again  {changed} tensors changed, {kept} are the base's")
    if result.not_verified is not None:
        lines.append(f"logits      not compared: {result.not_verified}")
    return lines


def _distances(result: MergeResult) -> Table:
    from rich.table import Table

    checked = result.verification
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("logits", "max", "mean", "same token", "KL"):
        table.add_column(name, justify="left" if name == "logits" else "right")
    if checked is None:
        return table
    rows = [("merged vs base + adapter", checked.merged)]
    if checked.noise is not None:
        rows.append((f"noise of running in {checked.noise_dtype}", checked.noise))
    if checked.base_gap is not None:
        held = "fp8" if result.base.quantization == "fp8" else "4-bit"
        rows.append((f"{held} vs original base, same adapter", checked.base_gap))
    for name, found in rows:
        table.add_row(
            name,
            f"{found.maximum:.2e}",
            f"{found.mean:.2e}",
            f"{found.top1_agreement:.1%}",
            f"{found.kl:.1e}",
        )
    table.caption = f"{checked.tokens} tokens, {checked.prompts_from}; bound {checked.bound:.2e}"
    table.caption_justify = "left"
    return table
