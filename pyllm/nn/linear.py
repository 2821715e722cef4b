from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyllm import _C, ops
from pyllm.nn.quantized import Quantizable
from pyllm.ops.linear import copy_for_replays

_FEW, _MANY = 4, 64  # rows, up to and from which a product is as fast with a weight that lies transposed


class Linear(Quantizable, torch.nn.Linear):
    """torch.nn.Linear on `pyllm.ops.linear`: (..., in_features) -> (..., out_features).

    Once quantised (see `Quantizable`), it runs on `pyllm.ops.quantized_linear`.
    """

    parts: tuple[int, ...]  # the rows of each, where the weight is that of several layers in one
    transposed = False  # whether the weight is a float32 file's, which has it so: until that would cost something

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return ops.quantized_linear(x, self.packed, self.bias)
        some = self.transposed and _C.recording() and _FEW < x.numel() // max(self.in_features, 1) < _MANY
        if some and copy_for_replays(self.weight) is None:
            self._lay_out()
        return ops.linear(x, self.weight, self.bias)

    def train(self, mode: bool = True) -> Linear:
        if mode:
            self._lay_out()
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # what `to` does
        super()._apply(fn, recurse)
        if self.weight is not None and self.weight.dtype != torch.float32:
            self._lay_out()
        return self

    def _lay_out(self) -> None:
        if self.transposed and self.weight is not None:
            with _disable_current_modes():  # it is not of a step that is recorded
                self.weight.data = self.weight.data.contiguous()
            self.transposed = False

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
