from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops import memory
from pyllm.ops.gradients import Function, once_differentiable
from pyllm.ops.linear import linear

_BLOCK = 1 << 24  # logits that exist at a time while gradients are computed
_BLOCK_ROWS = 768  # the most of their rows: a cache should serve the passes over them


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0,
                  reduction: str = "mean") -> Tensor:  # fmt: skip
    """The negative log-likelihood of `targets` under the softmax of `logits`.

    A row's loss has the same bits alone, in any batch, and for any number of threads.

    Args:
        logits: (..., V), float32, bfloat16 or float16; its rows may have any strides.
        targets: (...), int64 or int32, each in [0, V) or `ignore_index`.
        ignore_index: the target of rows that have no loss and no gradient.
        label_smoothing: this much of the target's probability is spread over all V classes (Szegedy et al., 2016,
            https://arxiv.org/abs/1512.00567).
        reduction: "mean" over the rows that are not ignored, "sum", or "none".

    Returns:
        float32: a scalar, or (...) for "none".

    Raises:
        IndexError: a target outside [0, V); the message has the target, its position and the bound. On a CUDA device
            its loss is NaN, and the next call on the device or `pyllm.synchronize` raises.
        ValueError, TypeError: a shape, dtype or option that does not fit.
    """
    if logits.dim() and logits.stride(-1) != 1:
        logits = logits.contiguous()
    targets = targets.contiguous()
    options = (ignore_index, label_smoothing, reduction)
    if logits.requires_grad and torch.is_grad_enabled():
        return _CrossEntropy.apply(logits, targets, options)
    result, losses, total = _results(targets, reduction)
    _C.cross_entropy_forward(logits, targets, losses, None, total, *options)
    return result


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
                         ignore_index: int = -100, label_smoothing: float = 0.0,
                         reduction: str = "mean") -> Tensor:  # fmt: skip
    """`cross_entropy(linear(x, weight, bias), targets)`, of whose logits only a block exists at a time, in float32.

    Where gradients are needed they are computed with the loss, so that the logits are computed once; for reduction
    "none", whose gradients wait for those of the losses, backward computes the logits again.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight: (V, K), x's dtype.
        targets: (...), int64 or int32, each in [0, V) or `ignore_index`.
        bias: (V,), x's dtype.

    The options, the result and the errors are those of `cross_entropy`. On a CUDA device the products are torch's
    (cuBLAS), a block of logits has x's dtype, and gradients of the weights are summed over the blocks in float32.
    """
    if x.dim() > 2:
        x = x.contiguous()
    targets = targets.contiguous()
    options = (ignore_index, label_smoothing, reduction)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _LinearCrossEntropy.apply(x, weight, targets, bias, options)
    return _linear(x, weight, targets, bias, options)[0]


def _results(targets: Tensor, reduction: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(what is returned, the same as the losses of the rows, the same as their total): one of these two is None."""
    result = targets.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32)
    return (result, result, None) if reduction == "none" else (result, None, result)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, targets, options):
        result, losses, total = _results(targets, options[2])
        statistics = targets.new_empty(2 * targets.numel(), dtype=torch.float32)
        _C.cross_entropy_forward(logits, targets, losses, statistics, total, *options)
        ctx.save_for_backward(logits, targets, statistics)
        ctx.options = options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, targets, statistics = ctx.saved_tensors
        dlogits = logits.new_empty(logits.shape) if logits.is_cuda else memory.empty(logits.shape, logits.dtype)
        _C.cross_entropy_backward(logits, targets, statistics, dloss.contiguous(), dlogits, *ctx.options)
        return dlogits, None, None


def _linear(x, weight, targets, bias, options, dloss=None, needed=(False, False, False)):
    """The loss and the needed gradients of x, weight and bias, for a gradient `dloss` of the loss, or 1."""
    if x.is_cuda:
        return _linear_on_cuda(x, weight, targets, bias, options, dloss, needed)
    result, losses, total = _results(targets, options[2])
    classes = weight.shape[0]
    most = max(120, min(_BLOCK_ROWS, _BLOCK // max(classes, 1))) if any(needed) else 512
    blocks = max(1, -(-targets.numel() // most))  # of equal size
    columns = classes if any(needed) else min(classes, 8192)
    block = memory.empty((max(1, -(-targets.numel() // blocks)), columns), torch.float32)
    dx = torch.empty(x.shape, dtype=x.dtype) if needed[0] else None
    dweight = torch.empty(weight.shape, dtype=x.dtype if blocks == 1 else torch.float32) if needed[1] else None
    dbias = torch.empty(classes, dtype=torch.float32) if needed[2] else None
    _C.linear_cross_entropy(x, weight, None if bias is None else bias.contiguous(), targets, block, losses, total,
                            dloss, dx, dweight, dbias, *options)  # fmt: skip
    return result, [None if d is None else d.to(x.dtype) for d in (dx, dweight, dbias)]


def _linear_on_cuda(x, weight, targets, bias, options, dloss=None, needed=(False, False, False)):
    """As `_linear`, each block's product by torch."""
    ignore_index, smoothing, reduction = options
    rows, of_row = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    losses = x.new_empty(len(of_row), dtype=torch.float32)
    dx = torch.empty_like(rows) if needed[0] else None
    dweight = x.new_zeros(weight.shape, dtype=torch.float32) if needed[1] else None
    dbias = x.new_zeros(len(weight), dtype=torch.float32) if needed[2] else None
    count = (of_row != ignore_index).sum() if reduction == "mean" else None
    if any(needed):
        scale = losses.new_ones(len(of_row)) if dloss is None else dloss.reshape(-1).expand(len(of_row))
        scale = (scale if count is None else scale / count).contiguous()
    size = max(128, _BLOCK // max(len(weight), 1))
    for first in range(0, len(of_row), size):
        block = slice(first, first + size)
        logits = linear(rows[block], weight, bias)
        statistics = losses.new_empty(2 * len(logits)) if any(needed) else None
        each = (ignore_index, smoothing, "none")
        _C.cross_entropy_forward(logits, of_row[block], losses[block], statistics, None, *each)
        if not any(needed):
            continue
        dlogits = torch.empty_like(logits)
        _C.cross_entropy_backward(logits, of_row[block], statistics, scale[block], dlogits, *each)
        if dx is not None:
            torch.mm(dlogits, weight, out=dx[block])
        if dweight is not None:
            dweight += dlogits.T @ rows[block]
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=torch.float32)
    result = losses.view(targets.shape) if reduction == "none" else losses.sum(dtype=torch.float64)
    result = (result if count is None else result / count).float()
    dx = None if dx is None else dx.view(x.shape)
    return result, [None if d is None else d.to(x.dtype) for d in (dx, dweight, dbias)]


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, weight, targets, bias, options):
        needed = (x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        early = options[2] != "none"
        loss, gradients = _linear(x, weight, targets, bias, options, None, needed if early else (False, False, False))
        ctx.save_for_backward(x, weight, targets, bias)
        ctx.options, ctx.needed, ctx.gradients = options, needed, gradients if early else None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        gradients, ctx.gradients = ctx.gradients, None  # given away: the caller may keep them as .grad without a copy
        if gradients is None:
            _, gradients = _linear(*ctx.saved_tensors, ctx.options, dloss.contiguous(), ctx.needed)
        elif dloss.item() != 1:
            gradients = [None if d is None else d.mul_(dloss) for d in gradients]
        dx, dweight, dbias = gradients
        return dx, dweight, None, dbias, None
