from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable


def wkv(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None, *,
        lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The linear recurrence of RWKV-7 (Peng et al., 2025, https://arxiv.org/abs/2503.14456).

    Each head keeps a matrix S of keys by values, which every step decays, corrects along one direction and writes to:

        S = diag(exp(w)) S + b (a' S) + k v'
        y = r' S

    (S here is the paper's state, transposed.) A sequence's result has the same bits alone, in any batch, with any
    padding, for any number of threads, and when it is fed in pieces with its state carried. On a CUDA device heads may
    have up to 128 dimensions, and a wrong length is found by the device.

    Args:
        r, k, v: receptance, key and value, (B, T, H, D), float32, bfloat16 or float16.
        w: the logarithm of the decay, r's shape and dtype: in RWKV-7, -exp(-0.5) * sigmoid(...).
        a, b: what is read from the state, and where that goes, r's shape and dtype: in RWKV-7 minus the normalised
            removal key, and that key times the rate of learning.
        state: (B, H, D, D) float32; zeros if not given.
        lengths: (B,) int64 of 0 to T. Outputs beyond a sequence's length are zeros, its last state is the one there.

    Returns:
        y, shaped and typed like r, and the last state, (B, H, D, D) float32.

    Raises:
        ValueError, TypeError: a shape, dtype or length that does not fit.
        NotImplementedError: a head too large for a CUDA device.
    """
    r, w, k, v, a, b = (t if t.dim() == 0 or t.stride(-1) == 1 else t.contiguous() for t in (r, w, k, v, a, b))
    if state is not None:
        state = state.contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (r, w, k, v, a, b, state)):
        return _Wkv.apply(r, w, k, v, a, b, state, lengths)
    y, final, _ = _forward(r, w, k, v, a, b, state, lengths)
    return y, final


def _forward(r, w, k, v, a, b, state, lengths, keep=False):
    if r.dim() != 4:
        raise ValueError(f"[wkv] r must have 4 dimensions (B, T, H, D), but got {tuple(r.shape)}")
    batch, time, heads, dim = r.shape
    y = r.new_empty(*r.shape)
    final = r.new_empty(batch, heads, dim, dim, dtype=torch.float32)
    kept = None
    if keep:  # the state every few steps, from which the backward pass makes the others again
        kept = r.new_empty(batch, heads, max(time - 1, 0) // _C.wkv_chunk(), dim, dim, dtype=torch.float32)
    _C.wkv_forward(r, w, k, v, a, b, state, lengths, y, final, kept)
    return y, final, kept


class _Wkv(Function):
    @staticmethod
    def forward(ctx, r, w, k, v, a, b, state, lengths):
        y, final, kept = _forward(r, w, k, v, a, b, state, lengths, keep=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(r, w, k, v, a, b, state, lengths, kept)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        *inputs, state, lengths, kept = ctx.saved_tensors
        if dy is None and dfinal is None:
            return (None,) * 8
        r = inputs[0]
        dy = r.new_zeros(r.shape) if dy is None else dy if dy.stride(-1) == 1 else dy.contiguous()
        gradients = [r.new_empty(*r.shape) for _ in inputs]
        dstate = torch.empty_like(state) if ctx.needs_input_grad[6] else None
        _C.wkv_backward(*inputs, state, lengths, kept, dy, None if dfinal is None else dfinal.contiguous(), *gradients,
                        dstate)  # fmt: skip
        return *gradients, dstate, None
