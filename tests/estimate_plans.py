"""Plans of published and measured runs, by model name and method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peftcli.architecture.catalog import find_model
from peftcli.architecture.config import Architecture, architecture_from, linear_shapes
from peftcli.estimate.facts import step_of
from peftcli.estimate.plan import Plan
from peftcli.estimate.step_model import TRL_LORA, TRL_QLORA

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]

# A bare loop over PEFT with Liger's norm, rotation and SwiGLU, and adapters in bfloat16.
FUSED = replace(TRL_QLORA, name="fused", kept_norm=2.0, kept_gated=4.0, loss_hidden=4.0)

# A plain loop without autocast that keeps all logits, on a float16 base with float32 adapters.
PLAIN_LOOP = replace(
    TRL_LORA,
    name="plain loop",
    kept_input=4.0,
    kept_rank=4.0,
    logits=14.0,
    loss_hidden=8.0,
    peak_mlp=4.0,
    adapter_copies=0.0,
)
# The same on a 4-bit base after prepare_model_for_kbit_training: a float32 stream.
PLAIN_LOOP_KBIT = replace(
    PLAIN_LOOP,
    name="plain loop, float32 stream",
    stream=4.0,
    kept_query=8.0,
    kept_key=8.0,
    kept_gated=12.0,
    kept_scores=8.0,
    peak_scores=20.0,
    kept_input=0.0,
    inputs_shared=True,
    logits=16.0,
    peak_mlp=8.0,
    peak_hidden=16.0,
)

QWEN_7B = architecture_from(
    {
        "model_type": "llama",  # the first Qwen is a Llama with other names
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 151936,
    }
)


def model(name: str) -> Architecture:
    if name == "qwen-7b":
        return QWEN_7B
    found = find_model(name)
    assert found is not None, name
    return found


def low_rank(name: str, *, rank: int = 16, targets: Any = "all-linear", **changes: Any) -> Plan:
    """TRL's LoRA on a 16-bit base: float32 adapters, torch's AdamW, no checkpointing."""
    architecture = model(name)
    chosen = tuple(linear_shapes(architecture, targets))
    plan = Plan(
        architecture=architecture,
        trainable=sum(x.count * rank * (x.inputs + x.outputs) for x in chosen),
        targets=chosen,
        rank=rank,
        optimizer="adamw_torch_fused",
        batch=changes.get("micro_batch", 1),
    )
    return stepped(replace(plan, **changes), changes)


def quantized(name: str, **changes: Any) -> Plan:
    """TRL's QLoRA: NF4 with double quantisation, bfloat16 adapters, paged 32-bit AdamW."""
    defaults = {"adapter_bytes": 2, "quantization": "nf4", "optimizer": "paged_adamw_32bit"}
    return low_rank(name, **{**defaults, **changes})


def houlsby(name: str, size: int = 64, **changes: Any) -> Plan:
    architecture = model(name)
    each = 2 * architecture.hidden_size * size + size + architecture.hidden_size
    plan = low_rank(name, targets=[], **changes)
    trainable = architecture.layers * 2 * each
    plan = replace(plan, bottleneck=size, sites=2, trainable=trainable)
    return stepped(plan, changes)


def full(name: str, **changes: Any) -> Plan:
    """Full fine-tuning with weights, gradients and states in `base_bytes` each."""
    architecture = model(name)
    size = changes.get("base_bytes", 2)
    plan = low_rank(name, targets=[], adapter_bytes=size, **changes)
    plan = replace(plan, trains_base=True, trainable=architecture.parameters())
    return stepped(plan, changes)


def stepped(plan: Plan, changes: dict[str, Any]) -> Plan:
    return plan if "step" in changes else replace(plan, step=step_of(plan))


def described(plan: object) -> str:
    """The name of a test case."""
    if not isinstance(plan, Plan):
        return str(plan)
    mode = "checkpointed" if plan.checkpointing else "kept"
    return f"{plan.architecture.model_type}-{plan.micro_batch}x{plan.length}-{mode}"
