from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyllm import ops

QUANTIZED = ("values", "scales", "minimums")  # what a quantised weight is made of, in a state dict


class Quantizable(nn.Module):
    """A layer whose weight (N, K) can be quantised: it is then in `packed`, and `weight` is None.

    Its state dict has weight.values, weight.scales and, in formats that have them, weight.minimums in place of weight,
    and loading such a one quantises it.
    """

    packed: ops.PackedQuantizedWeight | None = None

    def size(self) -> tuple[int, int]:
        """N and K."""
        raise NotImplementedError

    def quantize_(self, weight: ops.QuantizedWeight | ops.PackedQuantizedWeight) -> None:
        """Puts a quantised weight in the place of the layer's own; layers may share a packed one."""
        if weight.shape != self.size():
            raise ValueError(f"the quantised weight must have shape {self.size()}, but got {weight.shape}")
        own: Any = self.weight if self.packed is None else self.packed.panels
        packed = ops.pack_quantized(weight) if isinstance(weight, ops.QuantizedWeight) else weight
        self.packed = packed if own.is_meta else packed.to(own.device)
        self.register_parameter("weight", None)

    def load_quantized_(
        self, values: Tensor | None = None, scales: Tensor | None = None, minimums: Tensor | None = None
    ) -> None:
        """Puts a quantised weight, as state dicts have it, in the place of the layer's own."""
        if values is None or scales is None or values.dim() != 2 or scales.dim() != 2:
            raise ValueError("a quantised weight must have values and scales of 2 dimensions each")
        k, groups = self.size()[1], scales.shape[1]
        group = 16 if groups != -(-k // 32) and groups == -(-k // 16) else 32
        bits = 8 * values.shape[1] // max(group * groups, 1)
        self.quantize_(ops.QuantizedWeight(values, scales, minimums, bits, self.size(), group))

    def _apply(self, fn, recurse=True):  # what `to`, `cuda` and `cpu` do
        super()._apply(fn, recurse)
        if self.packed is not None:
            self.packed = self.packed.to(fn(self.packed.panels.new_empty(0)).device)
        return self

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
