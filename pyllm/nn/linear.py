from __future__ import annotations

import torch
from torch import Tensor

from pyllm import ops


class Linear(torch.nn.Linear):
    """torch.nn.Linear on `pyllm.ops.linear`: (..., in_features) -> (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)
