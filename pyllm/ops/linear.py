from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllm import _C


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, accumulated in float32.

    A row's result has the same bits alone, in any batch, and for any number of threads.

    Args:
        x: (..., K), float32, bfloat16 or float16, of any strides.
        weight: (N, K), x's dtype.
        bias: (N,), x's dtype.

    Returns:
        (..., N), typed like x.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
    """
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"[linear] x (..., K) and weight (N, K) must share K, but got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"[linear] {name} must be {x.dtype} like x, but got {t.dtype}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _matmul(x, weight.detach().T, bias)


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def _matmul(x: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.empty(*x.shape[:-1], b.shape[1], dtype=x.dtype)
    a = _rows(x.detach())
    _C.matmul(a, b, None if bias is None else bias.detach().contiguous(), out.view(a.shape[0], b.shape[1]))
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _matmul(x, weight.detach().T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = _matmul(dy, weight.detach()) if ctx.needs_input_grad[0] else None
        rows = _rows(dy)
        dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = _matmul(rows.T, _rows(x.detach()))
        if ctx.needs_input_grad[2]:
            dbias = torch.empty(rows.shape[1], dtype=dy.dtype)
            _C.column_sum(rows if rows.stride(1) == 1 else rows.contiguous(), dbias)
        return dx, dweight, dbias
