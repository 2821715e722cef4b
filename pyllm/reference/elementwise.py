from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BINARY: dict[str, Callable] = {"add": torch.add, "subtract": torch.sub, "multiply": torch.mul, "divide": torch.div,
           "minimum": torch.minimum, "maximum": torch.maximum}  # fmt: skip


def elementwise(kind: str, a: Tensor, b: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    wide = a.float() if a.is_floating_point() and b is not None else a
    if b is None:
        result = a.relu() if kind == "relu" else a
    else:
        result = _BINARY[kind](wide, b.float() if b.is_floating_point() else b)
    if out is None:
        return result.to(a.dtype, copy=True)
    return out.copy_(result)
