from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, *, theta: float = 10000.0, interleaved: bool = False,
         rotary_dim: int | None = None, inv_freq: Tensor | None = None, scale: float = 1.0) -> Tensor:  # fmt: skip
    dim = x.shape[-1] if rotary_dim is None else rotary_dim
    if inv_freq is None:
        inv_freq = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=x.device) / dim)
    angle = (positions.float()[..., None] * inv_freq.float()).unsqueeze(-2).double()  # (T or B,T, 1, dim / 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (angle.cos() * scale).to(wide), (angle.sin() * scale).to(wide)
    rotated, rest = x[..., :dim].to(wide), x[..., dim:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
