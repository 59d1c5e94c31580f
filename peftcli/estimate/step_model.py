"""What one training step keeps in memory: every coefficient that code or measurement decides."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, eq=False)
class StepModel:
    """Coefficients of a training step, in bytes per token and element unless said otherwise.

    `kept_*` terms stay from the forward pass to the backward pass of a layer that is not
    checkpointed. `peak_*` terms are what the backward pass of one layer's feed-forward block adds
    at its worst point.
    """

    name: str
    kept_norm: float = 4.0
    """Input of each norm on the stream, per hidden element; HF casts it to float32."""
    kept_query: float = 4.0
    """Rotated query and attention output, per element of the query projection."""
    kept_key: float = 4.0
    """Rotated key, and value, per element of the key projection."""
    kept_query_norm: float = 4.0
    """Input of the norms of queries and keys, per element of both projections."""
    kept_scores: float = 6.0
    """Eager attention only: float32 softmax and its 16-bit copy, per head and pair of tokens."""
    peak_scores: float = 16.0
    """Eager attention only: its backward pass, per head and pair of tokens."""
    kept_softcap: float = 2.0
    """Eager attention with capped scores: what the cap keeps, per head and pair of tokens."""
    kept_gated: float = 6.0
    """Gate, up and the activated gate, per intermediate element."""
    kept_ungated: float = 2.0
    """Input of the activation where there is no gate, per intermediate element."""
    kept_unfused: float = 6.0
    """What a GELU that is a chain of operations keeps beyond that."""
    kept_input: float = 2.0
    """Input of an adapted linear, per element, where it is not kept for another reason."""
    inputs_shared: bool = False
    """Query, key and value keep one copy of their input, and so do gate and up."""
    kept_mask: float = 1.0
    """Dropout mask of an adapted linear, per input element."""
    kept_rank: float = 2.0
    """What enters the second low-rank matrix, per unit of rank and adapted linear."""
    kept_scaled: float = 4.0
    """DoRA only: outputs of the base and of the update, per output element of adapted linears."""
    float32_outputs: bool = False
    """DoRA on 4 bits only: PEFT leaves the outputs in float32, and with them the stream."""
    kept_other: float = 0.0
    """Further bytes per hidden element and layer: inputs of trained norms and base weights."""
    kept_site: float = 0.0
    """Input of each bottleneck adapter, per hidden element, where nothing else keeps it."""
    stream: float = 2.0
    """A layer's input, which is all that a checkpointed layer keeps, per hidden element."""
    peak_mlp: float = 6.0
    """What the backward pass of the block adds at its fullest, per intermediate element."""
    peak_counted: float = 2.0
    """Of `peak_mlp`, what is among the kept bytes already where nothing is computed again."""
    peak_hidden: float = 10.0
    """What it adds per hidden element."""
    peak_unadapted: float = 6.0
    """As `peak_mlp`, where LoRA leaves the block's last linear out: gradients of gate, up and
    activation."""
    peak_frozen: float = 2.0
    """As `peak_hidden`, where LoRA leaves the whole block out."""
    peak_below: float = 6.0
    """As `peak_hidden`, where LoRA tunes linears of the block, but not its last one."""
    peak_below_joined: float = 10.0
    """The same where gate and up are one linear (Phi-3)."""
    peak_joined: float = 0.0
    """What that adds to `peak_hidden` where LoRA tunes the last one too."""
    peak_unread: float = 0.0
    """Of `peak_hidden` and its like, what a layer that is computed again does not have: its output,
    where it is not made."""
    peak_adapter: float = 0.0
    """Backward pass of the last adapter of a layer that is computed again, per hidden element: its
    input, and the gradients of that and of its output."""
    peak_mlp_dequantise: float = 2.0
    peak_hidden_dequantise: float = 2.0
    """Beside a dequantised weight, in the backward pass of the up-projections."""
    dequantised: float = 2.0625
    """Per element of the largest quantised weight: 16-bit copy and the scales of its blocks."""
    logits: float = 12.0
    """Per token and vocabulary entry, where all logits are held."""
    tile_bytes: float = 256 * 2**20
    """Largest tile of logits of a chunked loss, in bytes."""
    tile_tokens: int = 4096
    tile_parts: int = 0
    """Where logits are made for so many parts of the tokens at least, of 512 or more."""
    mlp_parts: tuple[int, int] | None = None
    """Fewest and most tokens of a checkpointed layer's MLP at a time, which are half of all
    between the two (peftcli/train/fast/blocks.py); None where they are all."""
    last_again: bool = True
    """Whether a layer that is computed again makes its output too, which nobody reads."""
    head_chunk: int = 32768
    """Rows of a float32 head that a chunked loss has in 16 bits at a time."""
    loss_hidden: float = 16.0
    """Gradient of the last hidden state and its copies, per token and hidden element."""
    head_again: float = 2.0
    """FLOPs per weight of the head for logits that the backward pass of the loss makes again."""
    head_gradient: float = 6.0
    """Per element of a trained head."""
    adapter_copies: float = 2.0
    """16-bit copies of a float32 adapter that autocast keeps, per value."""
    in_groups: bool = False
    """Linears with one input are one matrix, which holds the 16-bit factors too; 4-bit ones are
    expanded into a buffer that stays (peftcli/train/fast/four_bit.py)."""
    base_copies: float = 0.0
    """16-bit copies of float32 base weights that the backward pass needs, per weight."""
    traffic: float = 16.0
    """How often each kept byte is moved in element-wise work: time, not memory."""
    scores_traffic: float = 18.5
    """The same of the scores that eager attention keeps."""
    adapted_traffic: float = 14.7
    """What is moved for each input and output of adapted linears, of 2 bytes, beside that."""
    weight_traffic: float = 0.0
    """Bytes moved for each weight that DoRA measures, in each forward pass: time, not memory."""
    trained_traffic: float = 0.0
    """Bytes moved for each trained weight of the base in a micro-batch: casts and gradients."""
    expansion: float = 853e9
    """Bytes per second at which 4-bit weights are expanded, on an H200."""
    launch_seconds: float = 0.0
    """Per layer and pass (forward, again, backward), beside what the GPU computes."""
    launch_adapted: float = 0.000086
    """The same for each adapted linear: small products, which do not fill the GPU."""
    floor_seconds: float = 0.00113
    """Per layer and pass: what a CPU needs to start the kernels, however little they do. From short
    steps of the grid on a machine with an H200, 2026-11-26; others differ."""
    floor_adapted: float = 0.00009
    """What an adapted linear adds, per pass."""
    floor_again: float = 0.00065
    """What checkpointing adds to that, per layer that is computed again."""
    floor_quantised: float = 0.001
    """What expanding 4-bit weights adds, per layer and pass."""
    floor_magnitude: float = 0.00058
    """What DoRA adds, per adapted linear and forward pass."""
    attention_share: float = 0.63
    """Of what matrix products attain, with heads of 128; 445 of 700 TFLOP/s on an H200."""
    products_speed: float = 1.0
    """How much faster than in 16 bits products with the frozen base are."""
    rotary: float = 4.0
    """Cosine and sine tables, per token and head element."""


# Derived from the sources of transformers 5.23, peft 0.21 and trl 1.16 under bf16 autocast, and
# checked against measured peaks in tests/estimate/test_memory.py.
TRL_LORA = StepModel(name="TRL, LoRA in float32 on a 16-bit base")
TRL_LORA_DROPOUT = replace(
    TRL_LORA,
    name=f"{TRL_LORA.name}, with dropout",
    peak_mlp=10.0,
)
TRL_QLORA = replace(
    TRL_LORA,
    name="TRL, LoRA on a 4-bit base",
    inputs_shared=True,
    peak_mlp=4.0,
    peak_hidden=2.0,
    peak_below_joined=14.0,
    peak_joined=6.0,
    adapted_traffic=7.3,
)
TRL_QLORA_DROPOUT = replace(
    TRL_LORA_DROPOUT,
    name=f"{TRL_QLORA.name}, with dropout",
    peak_mlp=2.0,
    peak_hidden=10.0,
    peak_below_joined=TRL_QLORA.peak_below_joined,
    peak_joined=2.0,
    adapted_traffic=TRL_QLORA.adapted_traffic,
)
TRL_DORA = replace(
    TRL_LORA,
    name="TRL, DoRA",
    peak_mlp=14.0,
    peak_counted=0.0,
    peak_hidden=-2.0,
    traffic=4.1,
    scores_traffic=25.0,
    adapted_traffic=70.0,
    weight_traffic=86.0,
    launch_adapted=0.00016,
)
TRL_DORA_QUANTIZED = replace(
    TRL_DORA,
    name="TRL, DoRA on a 4-bit base",
    kept_gated=12.0,
    kept_scaled=6.0,
    float32_outputs=True,
    stream=4.0,
    peak_mlp=10.0,
    peak_unadapted=12.0,
    floor_quantised=0.0018,
)
TRL_BOTTLENECK = replace(
    TRL_LORA,
    name="TRL, bottleneck adapters",
    peak_mlp=6.0,
    peak_hidden=0.0,
    kept_other=4.0,
    traffic=18.0,
    launch_seconds=0.0007,
    floor_seconds=0.00125,
    floor_again=0.003,
    floor_quantised=0.0006,
)
TRL_FULL = replace(
    TRL_LORA,
    name="TRL, full fine-tuning in 16 bits",
    traffic=11.7,
    trained_traffic=110.0,
    floor_seconds=0.0016,
    kept_query_norm=6.0,
    kept_other=8.0,
    peak_mlp=4.0,
    peak_hidden=10.0,
)
TRL_LORA_FLOAT32 = replace(
    TRL_LORA,
    name="TRL, LoRA on a float32 base",
    rotary=8.0,
    stream=4.0,
    base_copies=2.0,
)
TRL_FULL_FLOAT32 = replace(
    TRL_FULL,
    name="TRL, full fine-tuning in float32",
    rotary=8.0,
    kept_other=18.0,
    stream=4.0,
    base_copies=2.0,
)

# Derived from peftcli/train/fast, and checked against measured peaks in the same place.
FUSED_LORA = StepModel(
    name="fused, LoRA in float32 on a frozen base",
    kept_norm=2.0,
    kept_query_norm=2.0,
    kept_gated=4.0,
    kept_input=0.0,
    peak_mlp=2.0,
    peak_counted=0.0,
    peak_hidden=4.0,
    peak_unread=2.0,
    peak_mlp_dequantise=0.0,
    peak_hidden_dequantise=6.0,
    dequantised=0.0,
    tile_tokens=1,
    tile_parts=4,
    mlp_parts=(1024, 4096),
    last_again=False,
    loss_hidden=6.0,
    head_again=0.0,
    adapter_copies=0.0,
    in_groups=True,
    traffic=7.0,
    adapted_traffic=3.7,
    expansion=2.5e12,
    launch_seconds=0.00006,
    launch_adapted=0.0,
    floor_seconds=0.0005,
    floor_quantised=0.00025,
    attention_share=0.9,
)
FUSED_FP8 = replace(
    FUSED_LORA,
    name="fused, LoRA on a base in fp8",
    peak_mlp=4.0,
    peak_hidden=6.0,
    mlp_parts=None,
    traffic=8.6,
    adapted_traffic=4.5,
    products_speed=2.0,
    floor_seconds=0.00079,
    floor_quantised=0.0,
)
FUSED_BOTTLENECK = replace(
    FUSED_LORA,
    name="fused, bottleneck adapters",
    kept_site=2.0,
    peak_unread=0.0,
    peak_adapter=6.0,
    last_again=True,
    adapter_copies=2.0,
    traffic=9.5,
    floor_seconds=0.00113,
)
