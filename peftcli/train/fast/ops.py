"""Operations of the fast step: Triton on a GPU, plain PyTorch anywhere else.

The plain twins define what the kernels compute; both round where transformers rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(rows x columns) -> normed rows, and 1/rms of each row (float32, or float64 for float64)."""
    if x.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.rms_norm(x, weight, epsilon)
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + epsilon)
    return weight * (wide * rstd[:, None]).to(x.dtype), rstd


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


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if gate.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.swiglu(gate, up)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup) from the gradient of h = silu(gate) * up; may reuse its arguments."""
    if gate.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.swiglu_backward(dh, gate, up)
    wide, grad = _wide(gate), _wide(dh)
    sigmoid = torch.sigmoid(wide)
    silu = (wide * sigmoid).to(gate.dtype)
    dgate = grad * _wide(up) * sigmoid * (1 + wide * (1 - sigmoid))
    return silu * up, dgate.to(gate.dtype), (grad * silu).to(gate.dtype)


def rope_(states: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    """Rotate (tokens x heads x width) in place by (tokens x width) angles; sign -1 rotates back."""
    if states.is_cuda:
        from peftcli.train.fast import triton_ops

        return triton_ops.rope_(states, cos, sin, sign)
    half = states.shape[-1] // 2
    first, second = states[..., :half].clone(), states[..., half:].clone()
    c, s = cos[:, None, :half], sign * sin[:, None, :half]
    states[..., :half] = first * c - second * s
    states[..., half:] = second * c + first * s
    return states


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    """Loss of each row in float32; with `scale`, logits become their gradient times it, in place."""
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
