from __future__ import annotations

import torch
from torch import Tensor


def wkv(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None, *,
        lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, wide = r.dtype, torch.promote_types(r.dtype, torch.float32)
    batch, time, heads, dim = r.shape
    s = r.new_zeros(batch, heads, dim, dim, dtype=wide) if state is None else state.to(wide)  # keys by values
    lengths = torch.full((batch,), time, device=r.device) if lengths is None else lengths
    r, w, k, v, a, b = (t.to(wide) for t in (r, w, k, v, a, b))
    decay, outputs = w.exp()[..., None], []
    for t in range(time):
        live = (t < lengths)[:, None, None]
        read = a[:, t, :, None] @ s  # (B, H, 1, D)
        new = decay[:, t] * s + b[:, t, :, :, None] * read + k[:, t, :, :, None] * v[:, t, :, None]
        s = torch.where(live[..., None], new, s)
        outputs.append(torch.where(live, (r[:, t, :, None] @ s)[:, :, 0], 0))
    return (torch.stack(outputs, 1) if time else r).to(dtype), s
