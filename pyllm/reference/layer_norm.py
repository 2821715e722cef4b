from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
               residual: Tensor | None = None, eps: float = 1e-5) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = _scaled(centred, weight, bias, eps).to(x.dtype)
    return y if residual is None else (y, h)


def rms_norm(x: Tensor, weight: Tensor | None = None, *,
             residual: Tensor | None = None, eps: float = 1e-6) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    h = x if residual is None else x + residual
    y = _scaled(h.to(torch.promote_types(h.dtype, torch.float32)), weight, None, eps).to(x.dtype)
    return y if residual is None else (y, h)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias
