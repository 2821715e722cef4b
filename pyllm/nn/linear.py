from __future__ import annotations

import torch
from torch import Tensor

from pyllm import ops
from pyllm.nn.quantized import Quantizable


class Linear(Quantizable, torch.nn.Linear):
    """torch.nn.Linear on `pyllm.ops.linear`: (..., in_features) -> (..., out_features).

    Once quantised (see `Quantizable`), it runs on `pyllm.ops.quantized_linear`.
    """

    parts: tuple[int, ...]  # the rows of each, where the weight is that of several layers in one

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return ops.quantized_linear(x, self.packed, self.bias)
        return ops.linear(x, self.weight, self.bias)

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.out_features, self.in_features)}

    def weight_inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"weight": x}


class Head(Linear):
    """The layer from hidden vectors to logits; with a softcap, these are softcap * tanh(logits / softcap) (Gemma 2)."""

    def __init__(self, hidden_size: int, vocab_size: int, *, bias: bool = False, softcap: float | None = None):
        super().__init__(hidden_size, vocab_size, bias=bias)
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.softcap is None else ops.tanh(logits / self.softcap) * self.softcap
