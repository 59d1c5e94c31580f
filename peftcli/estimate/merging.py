"""What `merge` takes of the host: memory while it streams, memory to compare, and disk."""

from __future__ import annotations

from collections import defaultdict

from peftcli.architecture.config import Architecture
from peftcli.architecture.families import family_of
from peftcli.estimate.result import MergeEstimate

# The first two from merges in tests/estimate/merges.jsonl with the original base, on two CPU
# cores, those of Llama-3.1-8B left out; the rest from what peftcli/merge holds.
GIB = 2**30
PROCESS = 0.45 * GIB  # PyTorch and transformers
BUFFERS = 0.15 * GIB  # of the workers: 8 MiB that are read, 8 that are written, and the sums
WORKERS = 5  # each at one tensor; up to 8 on more cores (peftcli/merge/stream.py)
# Bytes for each value of a tensor that is rounded: its code, and the scale of its block of 64 in
# float32, as quantising made it and as double quantisation holds it (peftcli/merge/blocks.py).
CODED = 1 / 2 + 2 * 4 / 64
AT_ONCE = 2  # tensors that are held whole at the same time, where rounding or an update needs that
WHOLE = 18  # bytes for each value of such a tensor: as read, rounded, in float32, and on the way
SPARE = 1.25  # of the weights in float32: logits, and what the loader holds on the way


def streaming_bytes(adapter_values: int, *, coded: int, whole: int) -> float:
    """Host memory of a whole merge; it follows the largest tensors, not the model."""
    return PROCESS + 4 * adapter_values + writing_bytes(coded=coded, whole=whole)


def writing_bytes(*, coded: int, whole: int = 0) -> float:
    """What writing takes beside the program and the adapter.

    `coded` values are held in 4 bits at a time, in all workers together; `whole` are those of the
    largest tensor that is held as it is.
    """
    return BUFFERS + CODED * coded + AT_ONCE * WHOLE * whole


def comparing_bytes(parameters: int) -> float:
    """Memory to run one whole model in float32, which is how a merge is verified."""
    return 4 * SPARE * parameters + GIB


def merge_estimate(
    architecture: Architecture, adapter_values: int, *, rounded: bool
) -> MergeEstimate:
    """The merge of an adapter, saved in 16 bits; `rounded` after training on a 4-bit base."""
    parameters = architecture.parameters()
    coded, whole = rounded_at_once(architecture) if rounded else (0, 0)
    return MergeEstimate(
        host_gib=streaming_bytes(adapter_values, coded=coded, whole=whole) / GIB,
        verify_gib=comparing_bytes(parameters) / GIB,
        disk_gib=2 * parameters / GIB,
    )


def rounded_at_once(architecture: Architecture) -> tuple[int, int]:
    """Values that rounding a 4-bit base holds: those in 4 bits, and those of a whole tensor.

    In 4 bits are the largest matrices of one layer, as many as there are workers, which take a
    layer's tensors in the order of the file; the large ones take longest. GPT-2's are stored the
    other way round, so that blocks run across the rows.
    """
    family = family_of(architecture.model_type)
    if family is not None and family.conv1d:
        return 0, max((x.weights for x in architecture.linears if x.quantizable), default=0)
    layers: defaultdict[int, list[int]] = defaultdict(list)
    for linear in architecture.linears:
        for layer in linear.layers if linear.quantizable else ():
            layers[layer].append(linear.weights)
    return max((sum(sorted(sizes)[-WORKERS:]) for sizes in layers.values()), default=0), 0
