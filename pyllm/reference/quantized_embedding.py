from __future__ import annotations

import torch
from torch import Tensor


def quantized_embedding(ids: Tensor, weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`weight`: an unpacked `QuantizedWeight`."""
    return weight.dequantize()[ids].to(dtype)
