from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import once_differentiable


@overload
def layer_norm(x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *, eps: float = ...) -> Tensor: ...
@overload
def layer_norm(x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *, residual: Tensor | None,
               eps: float = ...) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
               residual: Tensor | None = None, eps: float = 1e-5) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Layer normalisation over the last dimension (Ba et al., 2016, https://arxiv.org/abs/1607.06450).

    Args:
        x: (..., D), float32, bfloat16 or float16.
        weight, bias: (D,), any of the three dtypes, both the same.
        residual: like x. Where given, h = x + residual, rounded to x's dtype, is what gets normalised.
        eps: added to the variance.

    Returns:
        y, shaped and typed like x; with a residual, (y, h).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
    """
    return _norm(True, x, weight, bias, residual, eps)


@overload
def rms_norm(x: Tensor, weight: Tensor | None = ..., *, eps: float = ...) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor | None = ..., *, residual: Tensor | None,
             eps: float = ...) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(x: Tensor, weight: Tensor | None = None, *,
             residual: Tensor | None = None, eps: float = 1e-6) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Root mean square normalisation over the last dimension (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).

    Arguments, result and errors are those of `layer_norm`, which also subtracts the mean.
    """
    return _norm(False, x, weight, None, residual, eps)


def _norm(centred: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float):
    if x.dim() == 0:
        raise ValueError("[layer_norm] x must have at least 1 dimension, but got a scalar")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"[layer_norm] residual must have shape {tuple(x.shape)}, but got {tuple(residual.shape)}")
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y, h = _Norm.apply(centred, x, weight, bias, residual, eps)
    else:
        y, h, _, _ = _forward(centred, x, weight, bias, residual, eps, False)
    return y if residual is None else (y, h)


def _rows(t: Tensor) -> Tensor:
    if t.dim() == 2 and t.is_contiguous():
        return t
    rows = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _forward(centred, x, weight, bias, residual, eps, statistics):
    rows = _rows(x)
    y = torch.empty_like(rows)
    h = None if residual is None else torch.empty_like(y)
    rstd = rows.new_empty(rows.shape[0], dtype=torch.float32) if statistics else None
    mean = torch.empty_like(rstd) if statistics and centred else None
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _C.norm_forward(rows, None if residual is None else _rows(residual), weight, bias, y, h, mean, rstd, centred, eps)
    if x.dim() != 2:
        y, h = y.view(x.shape), None if h is None else h.view(x.shape)
    return y, x if h is None else h, mean, rstd


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, centred, x, weight, bias, residual, eps):
        y, h, mean, rstd = _forward(centred, x, weight, bias, residual, eps, True)
        ctx.centred, ctx.has_residual, ctx.has_bias = centred, residual is not None, bias is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, mean, rstd)
        return y, h if residual is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum):
        if dy is None:
            return None, dsum, None, None, dsum, None
        h, weight, mean, rstd = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        dh = torch.empty_like(h, memory_format=torch.contiguous_format) if needs_x or needs_residual else None
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
        dbias = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_bias else None
        if weight is not None and not weight.is_contiguous():
            weight = weight.contiguous()
        rows = dh if dh is None or dh.dim() == 2 else dh.view(-1, h.shape[-1])
        _C.norm_backward(_rows(dy), None if dsum is None else _rows(dsum), _rows(h), weight, mean, rstd, rows, dweight,
                         dbias, ctx.centred)  # fmt: skip
        return None, dh, dweight, dbias, dh if ctx.has_residual else None, None
