from __future__ import annotations

import torch
from torch import Tensor

from pyllm import ops


class Linear(torch.nn.Linear):
    """torch.nn.Linear on `pyllm.ops.linear`: (..., in_features) -> (..., out_features)."""

    parts: tuple[int, ...]  # the rows of each, where the weight is that of several layers in one

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Head(Linear):
    """The layer from hidden vectors to logits; with a softcap, these are softcap * tanh(logits / softcap) (Gemma 2)."""

    def __init__(self, hidden_size: int, vocab_size: int, *, bias: bool = False, softcap: float | None = None):
        super().__init__(hidden_size, vocab_size, bias=bias)
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
