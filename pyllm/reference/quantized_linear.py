from __future__ import annotations

import torch
from torch import Tensor


def pack_quantized(weight):
    return weight


def quantized_linear(x: Tensor, weight, bias: Tensor | None = None) -> Tensor:
    """`weight`: an unpacked `QuantizedWeight`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w = weight.dequantize().to(wide)
    # Straight through: the forward pass sees x in groups rounded to 8 bits, the backward pass x itself.
    padded = torch.nn.functional.pad(x.detach().float(), (0, -x.shape[-1] % weight.group))
    padded = padded.unflatten(-1, (-1, weight.group))
    scale = padded.abs().amax(-1, keepdim=True) / 127
    whole = (padded * torch.where(scale > 0, 127 / padded.abs().amax(-1, keepdim=True), 0)).round()
    rounded = (whole.to(wide) * scale.to(wide)).flatten(-2)[..., : x.shape[-1]]
    rounded = x.to(wide) + (rounded - x.detach().to(wide))
    y = rounded @ w.T
    return (y if bias is None else y + bias).to(x.dtype)
