from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyllm import _C


def elementwise(kind: str, a: Tensor, b: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """A copy of a, max(a, 0), or the sum, difference, product, quotient, minimum or maximum of a and b, for inference.

    What a recorded step runs in place of torch's own copies and plain arithmetic, with the same bits.

    Args:
        kind: "copy", "relu", "add", "subtract", "multiply", "divide", "minimum" or "maximum".
        a, b: of any strides, float32, bfloat16 or float16, computed in float32; or int64, but for "divide". Minimum and
            maximum are of int64 alone.
        out: where the result goes, of any strides, may be a or b; by default a new tensor of their common shape and
            a's dtype. A copy may change between the floating-point dtypes, or be of any one dtype.

    Returns:
        out.

    Raises:
        ValueError, TypeError: a kind, shape or dtype that does not fit, or a gradient that is asked for.
    """
    if torch.is_grad_enabled() and (a.requires_grad or (b is not None and b.requires_grad)):
        raise ValueError("[elementwise] has no gradients: a and b must not require one")
    if out is None:
        if b is None or a.shape == b.shape:
            out = torch.empty_like(a, memory_format=torch.contiguous_format)
        else:
            out = a.new_empty(common_shape(a, b))
    _C.elementwise(kind, a, b, out)
    return out


def common_shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """To which both broadcast. torch's own function imports a package for symbols, 35 MB and half a second of it."""
    try:
        return np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        found = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"[elementwise] a and b must broadcast together, but got {found}") from None
