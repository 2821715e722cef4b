from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C


def elementwise(kind: str, a: Tensor, b: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """A copy of a, max(a, 0), or the sum, difference, product or quotient of a and b. For inference: no gradients.

    What a recorded step runs in place of torch's own copies and plain arithmetic, with the same bits.

    Args:
        kind: "copy", "relu", "add", "subtract", "multiply" or "divide".
        a, b: of any strides, float32, bfloat16 or float16, computed in float32; or int64, but for "divide".
        out: where the result goes, of any strides, may be a or b; by default a new tensor of their common shape and
            a's dtype. A copy may change between the floating-point dtypes, or be of any one dtype.

    Returns:
        out.

    Raises:
        ValueError, TypeError: a kind, shape or dtype that does not fit.
    """
    if out is None:
        out = torch.empty(a.shape if b is None else torch.broadcast_shapes(a.shape, b.shape), dtype=a.dtype)
    _C.elementwise(kind, a, b, out)
    return out
