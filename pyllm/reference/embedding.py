from __future__ import annotations

from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    return weight[ids]
