"""The formula's moments against everything that a plain step really allocates, on tiny models."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bitsandbytes
import pytest
import torch
from allocations import Allocations
from bitsandbytes.optim import AdamW8bit
from estimate_plans import houlsby
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PhiConfig

from peftcli.architecture.config import architecture_from, linear_shapes
from peftcli.estimate.facts import step_of
from peftcli.estimate.gradients import end_to_end
from peftcli.estimate.memory import moments, static_parts
from peftcli.estimate.plan import Plan
from peftcli.estimate.weights import weights
from peftcli.methods import Lora
from peftcli.train.flat import FlatParameters

RANK = 4
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config_of(hidden: int, intermediate: int) -> LlamaConfig:
    """Wide enough for its sizes to tell which tensor is which; heads repeat no keys."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def quantize(base: torch.nn.Module) -> None:
    """Hold the linears in 4 bits, the head left out, as transformers does while it loads them."""
    linears = [(name, x) for name, x in base.named_modules() if isinstance(x, torch.nn.Linear)]
    for name, linear in linears:
        if name != "lm_head":
            small = bitsandbytes.nn.Linear4bit(
                *(linear.in_features, linear.out_features),
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            small.load_state_dict(linear.state_dict())
            base.set_submodule(name, small.to("cpu"))
    base.is_loaded_in_4bit = True


def tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, and the scales of those in 4 bits."""
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        found = state.as_dict().values() if state else ()
        yield from (x for x in found if isinstance(x, torch.Tensor))


def allocated(
    config: LlamaConfig, tokens: int, checkpointing: bool, *, four: bool = False, **options: Any
) -> int:
    """The peak of a forward and backward pass of all layers under autocast, loss left out."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    if four:
        quantize(base)
    chosen = LoraConfig(task_type="CAUSAL_LM", r=RANK, **options)
    model = get_peft_model(base, chosen).train()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    ids = torch.zeros(1, tokens, dtype=torch.long)
    gc.collect()
    with Allocations(tensors(model)) as counted:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = base.model(input_ids=ids, use_cache=False).last_hidden_state.sum()
        loss.backward()
    return counted.peak


def predicted(plan: Plan) -> float:
    """The formula's peak for the same."""
    held = weights(plan)
    left_out = ("loss", "optimizer step")
    largest = max(
        sum(part.size for part in parts)
        for name, parts in moments(plan, held).items()
        if name not in left_out
    )
    return largest + sum(part.size for part in static_parts(plan, held))


def plan_of(config: LlamaConfig, tokens: int, checkpointing: bool, **changes: Any) -> Plan:
    architecture = architecture_from(config.to_dict())
    targets = tuple(linear_shapes(architecture, list(changes.pop("targets", ALL))))
    each = [RANK * (x.inputs + x.outputs) + x.outputs * changes["magnitudes"] for x in targets]
    plan = Plan(
        architecture=architecture,
        trainable=sum(x.count * size for x, size in zip(targets, each, strict=True)),
        targets=targets,
        rank=RANK,
        optimizer="sgd",
        batch=1,
        length=tokens,
        checkpointing=checkpointing,
        **changes,
    )
    return replace(plan, step=step_of(plan))


# hidden, intermediate, tokens: from where weights decide to where activations do.
SIZES = [(128, 512, 64), (256, 512, 256), (128, 384, 1024)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("hidden", "intermediate", "tokens"), SIZES)
def test_dora(hidden: int, intermediate: int, tokens: int, checkpointing: bool) -> None:
    config = config_of(hidden, intermediate)
    peak = allocated(config, tokens, checkpointing, target_modules=list(ALL), use_dora=True)
    plan = plan_of(config, tokens, checkpointing, magnitudes=True)
    assert predicted(plan) == pytest.approx(peak, rel=0.025)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks for autocast without a device, which means CUDA, whose dropout keeps a mask."""
    by_device = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": by_device(device))

    def masked(self: torch.nn.Dropout, values: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(values, self.p, train=True)[0] if self.p else values

    monkeypatch.setattr(torch.nn.Dropout, "forward", masked)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("hidden", "intermediate", "tokens"), SIZES)
def test_dora_on_four_bits(
    hidden: int, intermediate: int, tokens: int, checkpointing: bool
) -> None:
    config = config_of(hidden, intermediate)
    options = {"target_modules": list(ALL), "use_dora": True}
    peak = allocated(config, tokens, checkpointing, four=True, **options)
    plan = plan_of(config, tokens, checkpointing, magnitudes=True, quantization="nf4")
    assert predicted(plan) == pytest.approx(peak, rel=0.015)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("four", [False, True], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_dora_with_dropout(four: bool, checkpointing: bool) -> None:
    config = config_of(256, 512)
    options = {"target_modules": list(ALL), "use_dora": True, "lora_dropout": 0.1}
    peak = allocated(config, 512, checkpointing, four=four, **options)
    quantization = "nf4" if four else None
    changes = {"magnitudes": True, "dropout": True, "quantization": quantization}
    plan = plan_of(config, 512, checkpointing, **changes)
    assert predicted(plan) == pytest.approx(peak, rel=0.025)


SETS = {
    "all": ALL,
    "attention": ALL[:4],
    "query and value": ("q_proj", "v_proj"),
    "feed-forward block": ALL[4:],
    "last linear": ("down_proj",),
}


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("targets", SETS.values(), ids=SETS)
@pytest.mark.parametrize("four", [False, True], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointed_lora_of_some_linears(
    targets: tuple[str, ...], four: bool, dropout: float
) -> None:
    config = config_of(128, 512)
    options = {"target_modules": list(targets), "lora_dropout": dropout}
    peak = allocated(config, 512, True, four=four, **options)
    quantization = "nf4" if four else None
    changes = {"magnitudes": False, "dropout": dropout > 0, "quantization": quantization}
    plan = plan_of(config, 512, True, targets=targets, **changes)
    assert -0.001 < predicted(plan) / peak - 1 < 0.012


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("targets", [SETS["attention"], SETS["query and value"], ("o_proj",)])
@pytest.mark.parametrize("four", [False, True], ids=["16 bits", "4 bits"])
def test_checkpointed_dora_of_attention(targets: tuple[str, ...], four: bool) -> None:
    config = config_of(128, 512)
    options = {"target_modules": list(targets), "use_dora": True}
    peak = allocated(config, 512, True, four=four, **options)
    quantization = "nf4" if four else None
    plan = plan_of(config, 512, True, targets=targets, magnitudes=True, quantization=quantization)
    assert -0.001 < predicted(plan) / peak - 1 < 0.012


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("targets", [("up_proj",), ("gate_proj", "up_proj")])
@pytest.mark.parametrize(("intermediate", "most"), [(512, 0.005), (1024, 0.05)])
def test_checkpointed_lora_of_the_first_linears_of_a_block(
    intermediate: int, most: float, targets: tuple[str, ...]
) -> None:
    """Too high where the block is much wider than the stream, never too low."""
    config = config_of(256, intermediate)
    peak = allocated(config, 512, True, target_modules=list(targets))
    plan = plan_of(config, 512, True, targets=targets, magnitudes=False)
    assert -0.001 < predicted(plan) / peak - 1 < most


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(
    "targets",
    [
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        *(("qkv_proj",), ("gate_up_proj",), ("qkv_proj", "gate_up_proj")),
    ],
)
@pytest.mark.parametrize("four", [False, True], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointed_lora_of_joined_linears(
    targets: tuple[str, ...], four: bool, dropout: float
) -> None:
    """Of Phi-3. In 4 bits too high without the block's last linear, never too low."""
    same = config_of(128, 512).to_dict() | {"pad_token_id": 0}
    config = Phi3Config(**{key: value for key, value in same.items() if key != "model_type"})
    options = {"target_modules": list(targets), "lora_dropout": dropout}
    peak = allocated(config, 512, True, four=four, **options)
    quantization = "nf4" if four else None
    changes = {"magnitudes": False, "dropout": dropout > 0, "quantization": quantization}
    plan = plan_of(config, 512, True, targets=targets, **changes)
    assert -0.002 < predicted(plan) / peak - 1 < (0.06 if four else 0.012)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_chain_of_operations_for_a_gelu(checkpointing: bool, activation: str) -> None:
    """Of Phi, GPT-2 and others: each operation keeps its inputs, those of one fused GELU do not."""
    own = {"resid_pdrop": 0.0, "num_hidden_layers": 6, "hidden_act": activation}
    same = config_of(128, 512).to_dict() | own
    config = PhiConfig(**{key: value for key, value in same.items() if key != "model_type"})
    targets = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
    peak = allocated(config, 512, checkpointing, target_modules=list(targets))
    plan = plan_of(config, 512, checkpointing, targets=targets, magnitudes=False)
    assert predicted(plan) == pytest.approx(peak, rel=0.04)


def test_dora_on_attention_alone() -> None:
    config, targets = config_of(128, 512), ("q_proj", "v_proj")
    peak = allocated(config, 256, False, target_modules=list(targets), use_dora=True)
    plan = plan_of(config, 256, False, targets=targets, magnitudes=True)
    assert predicted(plan) == pytest.approx(peak, rel=0.025)


@pytest.mark.usefixtures("as_on_cuda")
def test_dora_on_four_bits_of_attention_alone() -> None:
    config, targets = config_of(256, 512), ALL[:4]  # what goes to the stream among them
    peak = allocated(config, 256, False, four=True, target_modules=list(targets), use_dora=True)
    plan = plan_of(config, 256, False, targets=targets, magnitudes=True, quantization="nf4")
    assert predicted(plan) == pytest.approx(peak, rel=0.025)


@pytest.mark.parametrize("whole", [(), ("lm_head",), ("embed_tokens", "lm_head")], ids=str)
@pytest.mark.parametrize("rank", [4, 2100])
def test_what_is_large_is_not_copied_end_to_end(rank: int, whole: tuple[str, ...]) -> None:
    """Tables of words, and factors of more than 4 million values, as `FlatParameters` has it."""
    config = config_of(128, 2048)
    config.vocab_size = 40_000
    architecture = architecture_from(config.to_dict())
    method = Lora(rank=rank, target_modules=("down_proj",), modules_to_save=whole)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(base, method.peft_config(architecture))
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes])
    FlatParameters(optimizer)
    targets = method.footprint(architecture).targets
    plan = Plan(
        *(architecture, sum(shape.numel() for shape in shapes), targets, rank),
        trains_head="lm_head" in whole,
        flat=True,
    )
    (copy,) = end_to_end(plan, weights(plan))
    assert copy.size == optimizer.param_groups[0]["params"][0].nbytes


@pytest.mark.parametrize(("bottleneck", "joined"), [(64, True), (2048, False)])
def test_wide_bottlenecks_are_not_copied_end_to_end(bottleneck: int, joined: bool) -> None:
    plan = replace(houlsby("llama-3.1-8b", size=bottleneck), flat=True)
    (copy,) = end_to_end(plan, weights(plan))
    assert (copy.size > 0.99 * weights(plan).gradients) is joined
    assert (copy.size < 0.01 * weights(plan).gradients) is not joined
