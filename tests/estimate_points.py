"""Peaks that others published, and runs of plain TRL of our own, each as a plan of ours.

The T4 rows are allocated bytes of the authors of fitcheck-llm 0.3.1 (MIT). The others are what a
process took, as PyTorch's reserved bytes or nvidia-smi said it, on software that is not ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from estimate_plans import (
    PLAIN_LOOP,
    PLAIN_LOOP_KBIT,
    QKVO,
    full,
    low_rank,
    quantized,
)

from peftcli.architecture.config import architecture_from
from peftcli.estimate.fit import need
from peftcli.estimate.gpus import GIB, find_gpu
from peftcli.estimate.memory import training_peak
from peftcli.estimate.plan import Plan

Kind = Literal["allocated", "process"]
QV = ["q_proj", "v_proj"]
CK: dict[str, Any] = {"checkpointing": True}


@dataclass(frozen=True)
class Point:
    """A published peak beside the plan that stands for its setting."""

    what: str
    source: str
    gib: float
    kind: Kind
    gpu: str
    plan: Plan
    why: str = ""
    """Why ours is more than a tenth away."""

    @property
    def predicted(self) -> float:
        """What the formulas say of the same quantity, in GiB."""
        gpu = find_gpu(self.gpu)
        if self.kind == "allocated":
            return (training_peak(self.plan).size + 2 * gpu.workspace) / GIB  # of two threads
        return need(self.plan, gpu).card / GIB

    @property
    def error(self) -> float:
        """How far the prediction lies from the measurement, as a share of it."""
        return self.predicted / self.gib - 1


# model, base, kernel, rank, rows x tokens, allocated MiB
T4_ROWS = """
llama-3.2-1b nf4 eager 16 1x1024 3728
mistral-7b-v0.3 nf4 eager 16 1x1024 6191
mistral-7b-v0.3 nf4 masked 16 1x1024 6056
qwen2.5-1.5b nf4 eager 32 1x2048 6850
qwen2.5-1.5b nf4 masked 32 2x1024 6823
qwen2.5-1.5b none eager 32 1x2048 7410
qwen2.5-1.5b nf4 eager 16 1x1024 4236
qwen2.5-1.5b nf4 masked 16 1x1024 4235
qwen2.5-7b nf4 masked 16 1x1024 10586
smollm2-1.7b nf4 eager 32 1x2048 4323
smollm2-1.7b nf4 masked 32 4x1024 5281
smollm2-1.7b none eager 32 1x2048 5706
smollm2-1.7b none eager 32 4x1024 6537
smollm2-1.7b none masked 32 1x2048 4977
smollm2-1.7b none masked 32 4x1024 6529
smollm2-135m nf4 eager 32 1x4096 3679
smollm2-135m nf4 eager 32 2x512 1067
smollm2-135m nf4 masked 32 1x4096 3577
smollm2-135m nf4 masked 32 2x512 1064
smollm2-135m none eager 32 1x4096 3180
smollm2-135m none eager 32 2x512 1027
smollm2-135m none masked 32 1x4096 3148
smollm2-135m none masked 32 2x512 1027
smollm2-360m nf4 eager 32 1x4096 5687
smollm2-360m none eager 32 1x4096 4909
tinyllama-1.1b nf4 eager 32 1x1024 2020
tinyllama-1.1b nf4 eager 32 2x1024 2876
tinyllama-1.1b nf4 eager 32 2x2048 6655
tinyllama-1.1b nf4 eager 32 4x1024 4590
tinyllama-1.1b nf4 masked 32 1x1024 1843
tinyllama-1.1b nf4 masked 32 2x1024 2528
tinyllama-1.1b nf4 masked 32 2x2048 3897
tinyllama-1.1b nf4 masked 32 4x1024 3896
tinyllama-1.1b nf4 masked 32 8x1024 6632
tinyllama-1.1b nf4 masked 32 12x1024 9372
tinyllama-1.1b none eager 32 2x512 2757
tinyllama-1.1b none masked 32 2x512 2756
tinyllama-1.1b none masked 32 2x1024 3288
tinyllama-1.1b none masked 32 2x2048 4354
"""


def t4_points() -> Iterator[Point]:
    """LoRA on q, k, v, o in a plain loop that holds all logits, checkpointed."""
    for row in T4_ROWS.strip().splitlines():
        name, base, kernel, rank, shape, mib = row.split()
        rows, length = map(int, shape.split("x"))
        common: dict[str, Any] = {
            "rank": int(rank),
            "targets": QKVO,
            "micro_batch": rows,
            "length": length,
            "attention": kernel,
            "loss": "logits",
            "checkpointing": True,
        }
        if base == "none":
            plan = low_rank(name, **common, step=PLAIN_LOOP)
        else:
            # prepare_model_for_kbit_training holds what is not quantised in float32
            own = {"base_bytes": 4, "adapter_bytes": 4, "double_quantization": False}
            plan = quantized(name, **common, **own, optimizer="adamw_torch", step=PLAIN_LOOP_KBIT)
        kind = "float16" if base == "none" else "NF4"
        what = f"{name} {kind} {'eager' if kernel == 'eager' else 'SDPA'} r{rank}, {shape}"
        yield Point(what, "fitcheck-llm", float(mib) / 1024, "allocated", "t4", plan)


def trl_points() -> Iterator[Point]:
    """Plain TRL 1.16 + PEFT on an H200, Llama-3.1-8B, rank 16 on all linear layers."""
    name = "llama-3.1-8b"
    for gib, what, plan in (
        (20.1, "LoRA 4x2048 checkpointed", low_rank(name, micro_batch=4, **CK)),
        (69.6, "LoRA 4x2048", low_rank(name, micro_batch=4)),
        (69.6, "LoRA 1x8192", low_rank(name, length=8192)),
        (9.5, "QLoRA 4x2048 checkpointed", quantized(name, micro_batch=4, **CK)),
        (51.3, "QLoRA 4x2048", quantized(name, micro_batch=4)),
        (6.64, "QLoRA 1x2048 checkpointed", quantized(name, **CK)),
        (21.3, "QLoRA 1x32768 checkpointed", quantized(name, length=32768, **CK)),
    ):
        yield Point(f"{name} {what}", "our runs of plain TRL", gib, "allocated", "h200", plan)


LLAMA_65B = architecture_from(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 22016,
        "vocab_size": 32000,
    }
)
LLAMA_33B = architecture_from(
    {
        "model_type": "llama",
        "hidden_size": 6656,
        "num_hidden_layers": 60,
        "num_attention_heads": 52,
        "intermediate_size": 17920,
        "vocab_size": 32000,
    }
)
GB = 1e9 / 2**30
LEAN = "compiled kernels keep less for the backward pass than the eager ones that ours stands for"
FOUR_BITS = (
    "bitsandbytes 0.41, used there, kept the input of each 4-bit layer, today's does not: 1.5 of "
    "the 2.7 GiB; the rest is not explained"
)
UNCLEAR = (
    "grows by 6 MB for each token, where layer inputs and logits make 2 MB: what it checkpoints "
    "is not told"
)


def qwen_points() -> Iterator[Point]:
    """The Qwen README: LoRA r64 with dropout, FlashAttention 2, checkpointed, A100."""
    for gb, length in ((20.1, 256), (21.5, 1024), (23.8, 2048), (36.6, 8192)):
        plan = low_rank("qwen-7b", rank=64, dropout=True, length=length, loss="logits", **CK)
        yield Point(
            f"Qwen-7B LoRA r64, 1x{length}", "Qwen README", gb * GB, "process", "a100", plan
        )


def litgpt_points() -> Iterator[Point]:
    """LitGPT's resource tables: LoRA r8 on q and v, rows of up to 1304 tokens, A100 40 GB."""
    common: dict[str, Any] = {"rank": 8, "targets": QV, "length": 1304, "loss": "logits"}
    for gb, name, rows in (
        (21.30, "llama-2-7b", 1),
        (29.07, "llama-2-7b", 2),
        (38.12, "llama-2-13b", 1),
    ):
        plan = low_rank(name, micro_batch=rows, adapter_bytes=2, **common)
        what = f"{name} LoRA r8 q,v, {rows}x1304"
        yield Point(what, "LitGPT tables", gb * GB, "process", "a100 40gb", plan)
    for gb, double in ((14.14, False), (13.84, True)):
        plan = quantized(
            "llama-2-7b", double_quantization=double, optimizer="adamw_torch", **common
        )
        what = f"llama-2-7b NF4{' double' if double else ''} r8 q,v, 1x1304"
        yield Point(what, "LitGPT tables", gb * GB, "process", "a100 40gb", plan, FOUR_BITS)


def paper_points() -> Iterator[Point]:
    """QLoRA, arXiv 2305.14314, figure 6: rank 64, 1 x 512, paged optimizer."""
    for gb, name in ((6.9, "llama-2-7b"), (11.3, "llama-2-13b")):
        plan = quantized(name, rank=64, length=512, dropout=True, **CK)
        yield Point(f"{name} QLoRA r64, 1x512", "QLoRA paper", gb * GB, "process", "a100", plan)
    for gb, name, large in ((24.7, "LLaMA-33B", LLAMA_33B), (45.0, "LLaMA-65B", LLAMA_65B)):
        small = quantized("llama-2-7b", rank=64, length=512, dropout=True, **CK)
        targets = tuple(x for x in large.linears if x.kind != "head")
        trained = sum(x.count * 64 * (x.inputs + x.outputs) for x in targets)
        plan = replace(small, architecture=large, targets=targets, trainable=trained)
        yield Point(f"{name} QLoRA r64, 1x512", "QLoRA paper", gb * GB, "process", "a100", plan)


def torchtune_points() -> Iterator[Point]:
    """torchtune's README and tutorials: its own compiled models."""
    common: dict[str, Any] = {"micro_batch": 2, "adapter_bytes": 2, "rank": 8, **CK}
    for gib, what, plan in (
        (16.2, "LoRA 2x2048 packed, compiled", low_rank("llama-3.1-8b", **common)),
        (7.4, "QLoRA 2x2048 packed, compiled", quantized("llama-3.1-8b", **common)),
    ):
        yield Point(f"llama-3.1-8b {what}", "torchtune README", gib, "process", "4090", plan, LEAN)
    base: dict[str, Any] = {"micro_batch": 2, "length": 4096}
    ladder = full("llama-3.2-3b", loss="logits", **base)
    for gib, what, plan in (
        (60.0, "full 2x4096 packed", ladder),
        (42.9, "full 2x4096, chunked loss, compiled", full("llama-3.2-3b", **base)),
        (24.9, "the same, checkpointed", full("llama-3.2-3b", **base, **CK)),
    ):
        yield Point(f"llama-3.2-3b {what}", "torchtune README", gib, "process", "a100", plan, LEAN)


def swift_points() -> Iterator[Point]:
    """ms-swift 2.x, Qwen-7B-chat, LoRA r8 on the fused q, k, v; an older Trainer."""
    common: dict[str, Any] = {"rank": 8, "dropout": True, "loss": "logits"}
    qkv = ["q_proj", "k_proj", "v_proj"]
    for gib, length in ((18.01, 512), (21.73, 1024), (27.74, 2048), (35.31, 4096)):
        plan = low_rank("qwen-7b", targets=qkv, length=length, **common, **CK)
        what = f"Qwen-7B LoRA r8 qkv, 1x{length}"
        yield Point(what, "ms-swift benchmark", gib, "process", "a100", plan, UNCLEAR)


def comparison_points() -> Iterator[Point]:
    """PEFT's method comparison: Llama-3.2-3B, 4 rows of about 656 tokens, an L40S."""
    shape: dict[str, Any] = {"micro_batch": 4, "length": 656, "loss": "logits", "padded": True}
    for gib, what, plan in (
        (
            20.76,
            "LoRA r32 q,v",
            low_rank("llama-3.2-3b", rank=32, targets=QV, step=PLAIN_LOOP, **shape),
        ),
        (36.20, "full", full("llama-3.2-3b", **shape)),
    ):
        name = f"llama-3.2-3b {what}, 4x656"
        yield Point(name, "PEFT comparison", gib, "process", "l40s", plan)


def points() -> list[Point]:
    """All of them."""
    groups = (
        *(t4_points, trl_points, qwen_points, litgpt_points, paper_points, torchtune_points),
        *(swift_points, comparison_points),
    )
    return [point for group in groups for point in group()]
