from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.quantized_linear import PackedQuantizedWeight


def quantized_embedding(ids: Tensor, weight: PackedQuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows of a quantised weight that `ids` name: `weight.unpack().dequantize()[ids]`, rounded to dtype. For
    inference: there are no gradients.

    Args:
        ids: any shape, int64 or int32, each in [0, N).
        weight: (N, K), from `pack_quantized`; the same that `quantized_linear` takes.
        dtype: float32, bfloat16 or float16.

    Returns:
        (*ids.shape, K), of the dtype.

    Raises:
        IndexError: an id outside [0, N); the message has the id, its position and the bound. On a CUDA device its row
            is NaN, and the next call on the device or `pyllm.synchronize` raises.
        ValueError, TypeError: a dtype that does not fit, or a weight packed for another instruction set.
    """
    if not isinstance(weight, PackedQuantizedWeight):
        raise TypeError(f"[quantized_embedding] weight must come from pack_quantized, but got {type(weight).__name__}")
    n, k = weight.shape
    out = torch.empty(*ids.shape, k, dtype=dtype, device=weight.panels.device)
    _C.quantized_embedding(ids.contiguous(), weight.panels, out, n, *weight.layout)
    return out
