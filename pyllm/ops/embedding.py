from __future__ import annotations

import mmap

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """The rows of `weight` that `ids` name.

    The gradient of weight sums, in float32 and in the order of the positions, the gradients of the rows that an id got.

    Args:
        ids: any shape, int64 or int32, each in [0, V).
        weight: (V, D), float32, bfloat16 or float16.

    Returns:
        (*ids.shape, D), typed like weight.

    Raises:
        IndexError: an id outside [0, V); the message has the id, its position and the bound. On a CUDA device its row
            is NaN, and the next call on the device or `pyllm.synchronize` raises.
        ValueError, TypeError: a shape or dtype that does not fit.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return _Embedding.apply(ids, weight)
    return _forward(ids.contiguous(), weight)


def _forward(ids: Tensor, weight: Tensor) -> Tensor:
    if not weight.is_contiguous() and weight.dim() == 2 and weight.stride(1) != 1:
        weight = weight.contiguous()
    out = weight.new_empty(*ids.shape, weight.shape[-1])
    _C.embedding_forward(ids, weight, out)
    return out


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros that cost nothing until touched: fresh pages, most of which a gradient of few rows leaves alone."""
    size = shape.numel() * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class _Embedding(Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ids = ids.contiguous()
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return _forward(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        rows = dy.reshape(ids.numel(), ctx.shape[1])
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        large = ctx.shape.numel() * dy.dtype.itemsize >= 1 << 25 and 8 * ids.numel() <= ctx.shape[0]
        fresh = large and not dy.is_cuda
        dweight = _zeros(ctx.shape, dy.dtype) if fresh else dy.new_empty(ctx.shape)
        _C.embedding_backward(ids, rows, dweight, fresh)
        return None, dweight
