from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyllm import ops

QUANTIZED = ("panels", "layout")  # what a quantised weight is made of, in a state dict


class Quantizable(nn.Module):
    """A layer whose weight (N, K) can be quantised: it is then in `packed`, and `weight` is None.

    Its state dict has weight.panels and weight.layout in place of weight, as `ops.PackedQuantizedWeight` has them, and
    loading such a one, made for any instruction set, quantises it.
    """

    packed: ops.PackedQuantizedWeight | None = None

    def size(self) -> tuple[int, int]:
        """N and K."""
        raise NotImplementedError

    def quantize_(self, weight: ops.QuantizedWeight | ops.PackedQuantizedWeight) -> None:
        """Puts a quantised weight in the place of the layer's own; layers may share a packed one."""
        if weight.shape != self.size():
            raise ValueError(f"the quantised weight must have shape {self.size()}, but got {weight.shape}")
        own: Any = self.weight if self.packed is None else self.packed
        packed = ops.pack_quantized(weight) if isinstance(weight, ops.QuantizedWeight) else weight
        self.packed = packed if own.device.type == "meta" else packed.to(own.device)
        self.register_parameter("weight", None)

    def load_quantized_(self, panels: Tensor | None = None, layout: Tensor | None = None) -> None:
        """Puts a quantised weight, as state dicts have it, in the place of the layer's own."""
        if panels is None or layout is None or layout.dtype != torch.int64 or layout.dim() != 1:
            raise ValueError("a quantised weight must have panels, and a layout of whole numbers")
        packed = ops.PackedQuantizedWeight.of_panels(panels, tuple(layout.tolist()), self.size())
        self.quantize_(packed.unpack() if ops.REFERENCE else packed)

    def _apply(self, fn, recurse=True):  # what `to`, `cuda` and `cpu` do
        super()._apply(fn, recurse)
        if self.packed is not None:
            self.packed = self.packed.to(fn(torch.empty(0, device=self.packed.device)).device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if ops.REFERENCE and self.packed is not None:
            raise NotImplementedError("quantised weights are saved as the compiled kernels pack them, and with "
                                      "PYLLM_REFERENCE nothing packs them: save without it")  # fmt: skip
        if self.packed is not None:
            layout = torch.tensor(self.packed.layout, dtype=torch.int64)
            destination |= {f"{prefix}weight.panels": self.packed.panels, f"{prefix}weight.layout": layout}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        parts = {k: state_dict.pop(f"{prefix}weight.{k}", None) for k in QUANTIZED}
        if any(part is not None for part in parts.values()):
            self.load_quantized_(**parts)
        super()._load_from_state_dict(state_dict, prefix, *args)
