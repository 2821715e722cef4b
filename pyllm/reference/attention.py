from __future__ import annotations

import torch
from torch import Tensor

from pyllm.reference.paging import numbers


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None,
              scale: float | None = None, bias: Tensor | None = None, softcap: float | None = None,
              key_lengths: Tensor | None = None, segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
              page_table: Tensor | None = None, return_weights: bool = False,
              ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    if page_table is not None:
        assert key_lengths is not None
        first = torch.arange(page_table.shape[1], device=q.device) * k.shape[1]
        reached = page_table.where(first < key_lengths[:, None], torch.zeros_like(page_table))
        k, v = (t[reached].flatten(1, 2) for t in (k, v))  # (B, P * page size, ...)
        if k.dtype == torch.int8:
            k, v = numbers(k), numbers(v)
        if bias is not None and 1 < bias.shape[-1] < k.shape[1]:
            bias = torch.nn.functional.pad(bias, (0, k.shape[1] - bias.shape[-1]))
    (batch, queries, heads, dim), keys, wide = q.shape, k.shape[1], torch.promote_types(q.dtype, torch.float32)
    group = heads // k.shape[2]
    qs, ks, vs = q.to(wide).transpose(1, 2), *(t.to(wide).transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
    scores = qs @ ks.mT * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    lengths = torch.full((batch,), keys, device=q.device) if key_lengths is None else key_lengths
    j = torch.arange(keys, device=q.device)
    last = lengths[:, None] - queries + torch.arange(queries, device=q.device)  # the key that a causal query stands at
    seen = (j < lengths[:, None, None]).expand(batch, queries, keys)
    if causal:
        seen = seen & (j <= last[..., None])
    if window is not None:
        seen = seen & (j > last[..., None] - window)
        if not causal:
            seen = seen & (j < last[..., None] + window)
    if segment_ids is not None:
        of_query, of_key = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        seen = seen & (of_query[:, :, None] == of_key[:, None, :])
    seen = seen[:, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    out = (weights @ vs).transpose(1, 2).to(q.dtype)
    return (out, weights.to(q.dtype)) if return_weights else out
