"""Operations of the fast step: Triton on a GPU, plain PyTorch anywhere else.

The plain twins define what the kernels compute; both round where transformers rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_AT_ONCE = 128  # columns of an update that one small product holds in registers


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> Tensor:
    """(rows x columns) -> normed rows in `out`, whose rows may lie apart.

    Returns 1/rms of each row (float32, or float64 for float64).
    """
    if x.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.rms_norm(x, weight, epsilon, out)
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + epsilon)
    out.copy_(weight * (wide * rstd[:, None]).to(x.dtype))
    return rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, skip: Tensor | None = None
) -> Tensor:
    """Gradient of the norm's input, plus `skip`, the gradient that bypasses it; may reuse `dy`."""
    if x.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.rms_norm_backward(dy, x, weight, rstd, skip)
    scaled, wide, scale = _wide(dy) * weight, _wide(x), rstd[:, None]
    dot = (scaled * wide).mean(-1, keepdim=True)
    result = scale * (scaled - wide * (scale * scale * dot))
    return (result if skip is None else result + skip).to(x.dtype)


def swiglu(both: Tensor, out: Tensor) -> None:
    """silu(gate) * up into `out` (rows x columns); `both` holds gate and up side by side."""
    if both.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.swiglu(both, out)
    gate, up = both.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)
    return None


def swiglu_backward(dh: Tensor, both: Tensor) -> None:
    """Overwrites the gradient of h with h = silu(gate) * up; gate and up with their gradients."""
    if both.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.swiglu_backward(dh, both)
    gate, up = both.chunk(2, -1)
    wide, grad = _wide(gate), _wide(dh)
    sigmoid = torch.sigmoid(wide)
    silu = (wide * sigmoid).to(gate.dtype)
    dgate = grad * _wide(up) * sigmoid * (1 + wide * (1 - sigmoid))
    product, dup = silu * up, grad * silu  # before their arguments are overwritten
    dh.copy_(product)
    gate.copy_(dgate)
    up.copy_(dup)
    return None


def gated_backward(dh: Tensor, both: Tensor, low: Tensor, factors: Tensor) -> Tensor:
    """`swiglu_backward` for h that factors read: `dh` lacks low factors', and may be overwritten.

    `low` is the gradient of h A', `factors` are the A matrices. Returns the gradient of those.
    """
    if dh.is_cuda and dh.element_size() == 2:
        from peftcli.train.fast import triton_gated

        if triton_gated.fits(low.shape[1]):
            return triton_gated.gated_backward(dh, both, low, factors)
    dh.addmm_(low, factors)
    swiglu_backward(dh, both)
    return factor_gradient(low, dh)


def factor_gradient(left: Tensor, right: Tensor) -> Tensor:
    """left' right over all tokens, in the dtype that gradients are collected in."""
    if left.is_cuda and left.element_size() == 2:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T @ right


def add_(y: Tensor, low: Tensor | None, factors: Tensor, add: Tensor | None) -> Tensor:
    """y += low factors' + add; both at once on a GPU, where each pass over y counts."""
    if low is not None and add is not None and y.is_cuda and low.shape[1] <= MOST_AT_ONCE:
        from peftcli.train.fast import triton_products

        triton_products.add_both(y, low, factors, add)
        return y
    if low is not None:
        y.addmm_(low, factors.T)
    return y if add is None else y.add_(add)


def rope(heads: list[Tensor], cos: Tensor, sin: Tensor, sign: int, out: list[Tensor]) -> None:
    """Rotate queries and keys (tokens x heads x width each) by (tokens x width) angles into `out`.

    Sign -1 rotates back. `out` may be the same; values are copied, if they come third, and so is
    what lies beyond the angles where these are for the first columns only.
    """
    if cos.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.rope(heads, cos, sin, sign, out)
    half = cos.shape[-1] // 2
    c, s = cos[:, None, :half], sign * sin[:, None, :half]
    for states, room in zip(heads[:2], out, strict=False):
        first, second = states[..., :half].clone(), states[..., half : 2 * half].clone()
        room[..., 2 * half :] = states[..., 2 * half :]
        room[..., :half] = first * c - second * s
        room[..., half : 2 * half] = second * c + first * s
    for states, room in zip(heads[2:], out[2:], strict=True):
        room.copy_(states)
    return None


def rope_normed(
    heads: list[Tensor],
    weights: list[Tensor],
    epsilons: list[float],
    cos: Tensor,
    sin: Tensor,
    out: list[Tensor],
) -> list[Tensor]:
    """RMS norm of each head of queries and keys, then `rope`, into `out`, which lies elsewhere.

    Weights (width) and epsilons are those of the two norms. Returns 1/rms (tokens x heads) of both.
    """
    if cos.is_cuda:
        from peftcli.train.fast import triton_heads

        return triton_heads.rope_normed(heads, weights, epsilons, cos, sin, out)
    found = []
    for states, weight, epsilon, room in zip(heads, weights, epsilons, out, strict=True):
        normed = states.new_empty(states.shape)
        rstd = rms_norm(states.flatten(0, 1), weight, epsilon, normed.flatten(0, 1))
        room.copy_(normed)
        found.append(rstd.view(states.shape[:2]))
    rope(out, cos, sin, 1, out)
    return found


def rope_normed_backward(
    grads: list[Tensor],
    raw: list[Tensor],
    weights: list[Tensor],
    rstd: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    out: list[Tensor],
) -> None:
    """Gradients of `rope_normed`'s inputs, `raw`, into `out`; those of values are copied."""
    if cos.is_cuda:
        from peftcli.train.fast import triton_heads

        return triton_heads.rope_normed_backward(grads, raw, weights, rstd, cos, sin, out)
    rope(grads, cos, sin, -1, out)
    for room, states, weight, scale in zip(out, raw, weights, rstd, strict=False):
        flat = room.flatten(0, 1), states.flatten(0, 1)
        room.copy_(rms_norm_backward(*flat, weight, scale.flatten()).view(room.shape))
    return None


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    """Loss of each row in float32; with `scale`, logits become their gradient times it."""
    if logits.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.cross_entropy_(logits, targets, scale)
    wide = _wide(logits)
    total = wide.logsumexp(-1)
    losses = total - wide.gather(1, targets[:, None]).squeeze(1)
    if scale is not None:
        share = (wide - total[:, None]).exp()
        share[torch.arange(len(targets)), targets] -= 1
        logits.copy_(share * scale)
    return losses


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
