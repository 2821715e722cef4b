from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import overload

import torch
from torch import Tensor

from pyllm import ops


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension; with a residual, (norm(x + residual), x + residual) in one pass."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, *, bias: bool = True, device=None, dtype=None):
        super().__init__(hidden_size, eps, bias=bias, device=device, dtype=dtype)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.layer_norm(x, self.weight, self.bias, residual=residual, eps=self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension; with a residual, (norm(x + residual), x + residual) in one pass.

    `offset` is added to the weight, in float32: 1 for models that keep the weight's distance from 1 (Gemma)."""

    eps: float

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, offset: float = 0.0, device=None, dtype=None):
        super().__init__(hidden_size, eps, device=device, dtype=dtype)
        self.offset = offset
        if offset:
            torch.nn.init.constant_(self.weight, 1.0 - offset)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        weight = self.weight.float() + self.offset if self.offset else self.weight
        return ops.rms_norm(x, weight, residual=residual, eps=self.eps)


NORMS: dict[str, Callable[..., LayerNorm | RMSNorm]] = {
    "layer_norm": LayerNorm, "rms_norm": RMSNorm, "one_plus_rms_norm": partial(RMSNorm, offset=1.0),
}  # fmt: skip
