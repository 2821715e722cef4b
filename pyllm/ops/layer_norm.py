from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable


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
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _Norm.apply(centred, x, weight, bias, residual, eps)
    return _forward(centred, x, weight, bias, residual, eps, None)


def _forward(centred, x, weight, bias, residual, eps, statistics):
    if x.is_contiguous():
        y = torch.empty_like(x)  # a memory format that is spelled out costs a call 0.2 us
    else:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        x = _rows(x)
    if residual is None:
        _C.norm_forward(x, None, _whole(weight), _whole(bias), y, None, statistics, centred, eps)
        return y
    h = torch.empty_like(y)
    _C.norm_forward(x, _rows(residual), _whole(weight), _whole(bias), y, h, statistics, centred, eps)
    return y, h


def _rows(t: Tensor) -> Tensor:
    return t if t.is_contiguous() or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _whole(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


class _Norm(Function):
    @staticmethod
    def forward(ctx, centred, x, weight, bias, residual, eps):
        statistics = x.new_empty(2 if centred else 1, x.shape[:-1].numel(), dtype=torch.float32)
        out = _forward(centred, x, weight, bias, residual, eps, statistics)
        ctx.centred = centred
        if residual is None:
            ctx.save_for_backward(x, weight, statistics)
        else:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(out[1], weight, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        if dy is None:
            return None, dsum, None, None, dsum, None
        h, weight, statistics = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        dh = torch.empty_like(h, memory_format=torch.contiguous_format) if needs_x or needs_residual else None
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = torch.empty_like(weight) if needs_bias else None
        _C.norm_backward(_rows(dy), None if dsum is None else _rows(dsum), _rows(h), _whole(weight), statistics, dh,
                         dweight, dbias, ctx.centred)  # fmt: skip
        return None, dh, dweight, dbias, dh if needs_residual else None, None
