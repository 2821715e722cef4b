from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable


def rope(x: Tensor, positions: Tensor, *, theta: float = 10000.0, interleaved: bool = False,
         rotary_dim: int | None = None, inv_freq: Tensor | None = None, scale: float = 1.0) -> Tensor:  # fmt: skip
    """Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864).

    Pair i of a head turns by the angle position * theta^(-2 i / rotary_dim). The frequency and its product with the
    position are rounded to float32, as in the programs that models were trained with: what that loses at far positions
    they have learnt; nothing is lost of the angle's sine and cosine. What a token gets depends on its position alone,
    bit for bit.

    Args:
        x: (B, T, H, D), float32, bfloat16 or float16.
        positions: (T,) or (B, T), int64 or int32.
        theta: the base of the frequencies.
        interleaved: pairs are neighbours (2 i, 2 i + 1), as in the paper, not (i, i + rotary_dim / 2).
        rotary_dim: the elements of a head that turn, an even number; all D without it. The rest are copied.
        inv_freq: (rotary_dim / 2,), the frequencies themselves in place of theta's, for scaled forms of rope.
        scale: multiplies the turned elements.

    Returns:
        Shaped and typed like x.

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit.
    """
    rotary = rotary_dim if rotary_dim is not None else x.shape[-1] if x.dim() else 0
    if inv_freq is None:
        inv_freq = _frequencies(theta, rotary, x.device if x.is_cuda else None)
    elif inv_freq.requires_grad:
        raise ValueError("[rope] inv_freq must not require a gradient: rope has none for it")
    else:
        inv_freq = inv_freq.to(torch.float32).contiguous()
    positions = positions.contiguous()
    if x.requires_grad and torch.is_grad_enabled():
        return _Rope.apply(x, positions, inv_freq, rotary, interleaved, scale)
    return _turn(x, positions, inv_freq, rotary, interleaved, scale, False)


@lru_cache(maxsize=64)
def _frequencies(theta: float, rotary: int, device: torch.device | None) -> Tensor:
    if not theta > 0:
        raise ValueError(f"[rope] theta must be more than 0, but got {theta}")
    with torch.inference_mode(False), _disable_current_modes():  # a cached tensor must do for training too
        steps = torch.arange(0, max(rotary, 0), 2, dtype=torch.float32, device="cpu") / rotary
        return (1 / theta**steps).to(device or "cpu")  # the CPU's bits on any device


def _turn(x, positions, inv_freq, rotary, interleaved, scale, inverse):
    if x.dim() and x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.rope(x, positions, inv_freq, out, rotary, interleaved, scale, inverse)
    return out


class _Rope(Function):
    @staticmethod
    def forward(ctx, x, positions, inv_freq, *options):
        ctx.save_for_backward(positions, inv_freq)
        ctx.options = options
        return _turn(x, positions, inv_freq, *options, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        positions, inv_freq = ctx.saved_tensors
        return _turn(dy, positions, inv_freq, *ctx.options, True), None, None, None, None, None
