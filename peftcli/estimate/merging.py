"""What `merge` takes of the host: memory while it streams, memory to compare, and disk."""

from __future__ import annotations

from peftcli.architecture.config import Architecture
from peftcli.estimate.result import MergeEstimate

# From merges in tests/estimate/merges.jsonl, on two CPU cores, those of Llama-3.1-8B left out.
# Rounding varies from run to run: one and the same merge of Llama-2-7B took 1.84 and 2.13 GiB.
GIB = 2**30
PROCESS = 0.45 * GIB  # PyTorch and transformers
BUFFERS = 0.15 * GIB  # of the workers that write
AT_ONCE = 2  # tensors that are held whole at the same time, where a 4-bit base is rounded
WHOLE = 18  # bytes for each value of such a tensor: as read, rounded, in float32, and on the way
SPARE = 1.25  # of the weights in float32: logits, and what the loader holds on the way


def streaming_bytes(adapter_values: int, largest_tensor: int) -> float:
    """Host memory of a whole merge; it follows the largest tensor, not the model."""
    return PROCESS + 4 * adapter_values + writing_bytes(largest_tensor)


def writing_bytes(largest_tensor: int) -> float:
    """What writing takes beside the program and the adapter; `largest_tensor` is held whole."""
    return BUFFERS + AT_ONCE * WHOLE * largest_tensor


def comparing_bytes(parameters: int) -> float:
    """Memory to run one whole model in float32, which is how a merge is verified."""
    return 4 * SPARE * parameters + GIB


def merge_estimate(
    architecture: Architecture, adapter_values: int, *, rounded: bool
) -> MergeEstimate:
    """The merge of an adapter, saved in 16 bits; `rounded` after training on a 4-bit base."""
    parameters = architecture.parameters()
    whole = (x.weights for x in architecture.linears if x.quantizable and rounded)
    largest = max(whole, default=0)
    return MergeEstimate(
        host_gib=streaming_bytes(adapter_values, largest) / GIB,
        verify_gib=comparing_bytes(parameters) / GIB,
        disk_gib=2 * parameters / GIB,
    )
