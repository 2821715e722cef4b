from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable
from pyllm.ops.paging import head_size


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: int | None = ...,
              scale: float | None = ..., bias: Tensor | None = ..., softcap: float | None = ...,
              key_lengths: Tensor | None = ..., segment_ids: Tensor | tuple[Tensor, Tensor] | None = ...,
              page_table: Tensor | None = ..., return_weights: Literal[False] = ...) -> Tensor: ...  # fmt: skip
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: int | None = ...,
              scale: float | None = ..., bias: Tensor | None = ..., softcap: float | None = ...,
              key_lengths: Tensor | None = ..., segment_ids: Tensor | tuple[Tensor, Tensor] | None = ...,
              page_table: Tensor | None = ..., return_weights: bool,
              ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None,
              scale: float | None = None, bias: Tensor | None = None, softcap: float | None = None,
              key_lengths: Tensor | None = None, segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
              page_table: Tensor | None = None, return_weights: bool = False,
              ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Scaled dot-product attention: softmax(q k' * scale + bias) v.

    Computed tile by tile with an online softmax (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867; Dao et
    al., 2022, https://arxiv.org/abs/2205.14135), in memory linear in the number of positions, accumulated in float32.
    On the CPU a query's result has the same bits alone, in any batch and chunk of queries, for any number of threads,
    and whatever lies in k and v beyond `key_lengths`. On a CUDA device a row's bits do not depend on its batch, but may
    on how many queries there are; wrong lengths and pages are raised by the next call there, or by `pyllm.synchronize`.

    Args:
        q: (B, Tq, H, D), float32, bfloat16 or float16, D from 1 to 256.
        k: (B, Tk, Hkv, D), q's dtype; H is a multiple of Hkv, and query head h reads key head h // (H // Hkv).
        v: (B, Tk, Hkv, Dv), q's dtype; Dv from 1 to 256.
        causal: a query sees the keys up to its own position; the last query stands at the sequence's last key.
        window: a query sees only the `window` keys up to its own position, and, where it is not causal, as many
            from there on.
        scale: what the products are multiplied by; 1 / sqrt(D) by default.
        bias: broadcastable to (B, H, Tq, Tk), any of the three dtypes; added to the scores, and given a gradient. A key
            whose bias is -infinity is masked.
        softcap: scores become softcap * tanh(scores / softcap), before the bias (Gemma 2).
        key_lengths: (B,), int64 or int32: how many keys of each sequence count.
        segment_ids: (B, T), int64 or int32, for queries and keys alike, or a pair (B, Tq), (B, Tk): a query sees only
            the keys of its own segment.
        page_table: (B, P), int32: k and v are pages, (pages, page size, Hkv, D), the page size a multiple of 64, and
            key j of sequence b is key j % page size of page page_table[b, j // page size]. The bits are those of keys
            that lie next to each other. It needs key_lengths, in which Tk is P * page size; entries beyond those are
            not read, and a bias may end where they do. On the CPU, pages may be of int8, as `write_pages` makes them
            for D and Dv; the bits are those of what they stand for in float32 or, where the processor has dot products
            of bytes and D is a multiple of 4, Dv of 16, those of products of whole numbers: queries and weights are
            rounded to 16 bits then, 256 times as finely as the pages. For inference: no gradients.
        return_weights: also returns the softmax's result, (B, H, Tq, Tk) in q's dtype.

    Returns:
        (B, Tq, H, Dv) in q's dtype; with `return_weights`, that and the weights. A query that sees no key gets zeros.

    Raises:
        ValueError, TypeError: a shape, dtype or length that does not fit; a gradient of keys in pages.
        IndexError: an entry of the page table that names no page.
        NotImplementedError: int8 pages on a CUDA device.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"[attention] {name} must have 4 dimensions (B, T, H, D), but got {tuple(t.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"[attention] window must be 1 or more, but got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"[attention] softcap must be positive, but got {softcap}")
    of_query, of_key = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if scale is None:
        scale = max(1, q.shape[-1]) ** -0.5
    masks = (key_lengths, of_query, of_key)
    options = (causal, window or 0, scale, softcap or 0.0)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    ):
        if page_table is not None:
            raise ValueError("[attention] page_table is for inference: q, k, v and bias must not require a gradient "
                             "(call within torch.no_grad())")  # fmt: skip
        out, weights = _Attention.apply(q, k, v, bias, masks, options, return_weights)
    else:
        out, _, weights = _forward(q.detach(), k.detach(), v.detach(), None if bias is None else bias.detach(), masks,
                                   page_table, options, return_weights, return_weights)  # fmt: skip
    return (out, weights) if return_weights else out


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _forward(q, k, v, bias, masks, page_table, options, keep_lse, return_weights):
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    out = q.new_empty(batch, queries, heads, head_size(v))
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32) if keep_lse else None
    weights = None
    if return_weights:
        pages = 1 if page_table is None else page_table.shape[-1]
        weights = q.new_empty(batch, heads, queries, pages * keys)
    _C.attention_forward(_rows(q), _rows(k), _rows(v), bias, *masks, page_table, out, lse, weights, *options)
    return out, lse, weights


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, masks, options, return_weights):
        q, k, v = (_rows(t.detach()) for t in (q, k, v))
        bias = None if bias is None else bias.detach()
        out, lse, weights = _forward(q, k, v, bias, masks, None, options, True, return_weights)
        ctx.save_for_backward(q, k, v, bias, out, lse, weights, *masks)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dweights):
        q, k, v, bias, out, lse, weights, *masks = ctx.saved_tensors
        if dout is None and dweights is None:
            return (None,) * 7
        dout = torch.zeros_like(out) if dout is None else _rows(dout)
        dweights = None if dweights is None else dweights.contiguous()
        wanted = ctx.needs_input_grad
        dq = q.new_empty(*q.shape) if wanted[0] else None
        dk, dv = (t.new_empty(*t.shape) if wanted[1] or wanted[2] else None for t in (k, v))
        dbias = bias.new_empty(bias.shape) if wanted[3] else None  # which may have no dimensions
        _C.attention_backward(q, k, v, bias, *masks, out, lse, weights, dout, dweights, dq, dk, dv, dbias, *ctx.options)
        return dq, dk, dv, dbias, None, None, None
