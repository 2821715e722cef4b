from __future__ import annotations

import torch
from torch import Tensor

from pyllm import ops

QUANTIZED = ("values", "scales", "minimums")  # what a quantised weight is made of, in a state dict


class Linear(torch.nn.Linear):
    """torch.nn.Linear on `pyllm.ops.linear`: (..., in_features) -> (..., out_features).

    Once quantised, it runs on `pyllm.ops.quantized_linear`, and `weight` is None; its state dict has weight.values,
    weight.scales and, in formats that have them, weight.minimums instead, and loading such a one quantises it.
    """

    parts: tuple[int, ...]  # the rows of each, where the weight is that of several layers in one
    packed: ops.PackedQuantizedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return ops.quantized_linear(x, self.packed, self.bias)
        return ops.linear(x, self.weight, self.bias)

    def quantize_(self, weight: ops.QuantizedWeight) -> None:
        """Puts a quantised weight in the place of the layer's own."""
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"the quantised weight must have shape {(self.out_features, self.in_features)}, "
                             f"but got {weight.shape}")  # fmt: skip
        self.packed = ops.pack_quantized(weight)
        self.register_parameter("weight", None)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            weight = self.packed.unpack()
            parts = {"values": weight.values, "scales": weight.scales, "minimums": weight.minimums}
            destination |= {f"{prefix}weight.{k}": v for k, v in parts.items() if v is not None}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        parts = {k: state_dict.pop(f"{prefix}weight.{k}", None) for k in QUANTIZED}
        if any(part is not None for part in parts.values()):
            self.load_quantized_(**parts)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_quantized_(self, values: Tensor | None, scales: Tensor | None, minimums: Tensor | None = None) -> None:
        """Puts a quantised weight, as state dicts have it, in the place of the layer's own."""
        if values is None or scales is None or values.dim() != 2 or scales.dim() != 2:
            raise ValueError("a quantised weight must have values and scales of 2 dimensions each")
        bits = 8 * values.shape[1] // max(32 * scales.shape[1], 1)
        self.quantize_(ops.QuantizedWeight(values, scales, minimums, bits, (self.out_features, self.in_features)))


class Head(Linear):
    """The layer from hidden vectors to logits; with a softcap, these are softcap * tanh(logits / softcap) (Gemma 2)."""

    def __init__(self, hidden_size: int, vocab_size: int, *, bias: bool = False, softcap: float | None = None):
        super().__init__(hidden_size, vocab_size, bias=bias)
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.softcap is None else ops.tanh(logits / self.softcap) * self.softcap
