from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pyllm import ops

QUANTIZED = ("panels", "layout")  # what a quantised weight is made of, in a state dict
_NONE: Mapping[str, ops.PackedQuantizedWeight] = MappingProxyType({})


class Quantizable(nn.Module):
    """A layer with weights (N, K) that can be quantised: they are then in `quantized`, by name, and the layer's own are
    None.

    Its state dict has weight.panels and weight.layout in place of weight, as `ops.PackedQuantizedWeight` has them, the
    layout with the shape behind it, and loading such a one, made for any instruction set, quantises it.
    """

    quantized: Mapping[str, ops.PackedQuantizedWeight] = _NONE

    def sizes(self) -> dict[str, tuple[int, int]]:
        """N and K of each weight that can be quantised, by name."""
        raise NotImplementedError

    def weight_inputs(self, *inputs: Any) -> dict[str, Tensor]:
        """What weights are multiplied by, (..., K) each, where these come to the layer."""
        return {}

    @property
    def packed(self) -> ops.PackedQuantizedWeight | None:
        """The quantised weight of a layer that has the one."""
        return self.quantized.get("weight")

    def quantize_(self, weight: ops.QuantizedWeight | ops.PackedQuantizedWeight, name: str = "weight") -> None:
        """Puts a quantised weight in the place of the layer's own; layers may share a packed one."""
        if weight.shape != self.sizes()[name]:
            raise ValueError(f"the quantised weight must have shape {self.sizes()[name]}, but got {weight.shape}")
        own: Any = self.quantized.get(name, getattr(self, name))
        packed = ops.pack_quantized(weight) if isinstance(weight, ops.QuantizedWeight) else weight
        packed = packed if own.device.type == "meta" else packed.to(own.device)
        self.quantized = {**self.quantized, name: packed}
        setattr(self, name, None)

    def load_quantized_(self, name: str, panels: Tensor | None = None, layout: Tensor | None = None) -> None:
        """Puts a quantised weight, as state dicts have it, in the place of the layer's own."""
        if name not in self.sizes():
            raise ValueError(f"there must be no quantised weight of this name, but only of {', '.join(self.sizes())}")
        if panels is None or layout is None or layout.dtype != torch.int64 or layout.dim() != 1:
            raise ValueError("a quantised weight must have panels, and a layout of whole numbers")
        numbers, expected = tuple(layout.tolist()), self.sizes()[name]
        shape = numbers[4:] or expected  # panels alone do not tell how many of their last rows and columns count
        if shape != expected:
            raise ValueError(f"the quantised weight must have shape {expected}, but got {shape}")
        packed = ops.PackedQuantizedWeight.of_panels(panels, numbers[:4], expected)
        self.quantize_(packed.unpack() if ops.REFERENCE else packed, name)

    def _apply(self, fn, recurse=True):  # what `to`, `cuda` and `cpu` do
        super()._apply(fn, recurse)
        if self.quantized:
            self.quantized = {k: w.to(fn(torch.empty(0, device=w.device)).device) for k, w in self.quantized.items()}
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if ops.REFERENCE and self.quantized:
            raise NotImplementedError("quantised weights are saved as the compiled kernels pack them, and with "
                                      "PYLLM_REFERENCE nothing packs them: save without it")  # fmt: skip
        for name, packed in self.quantized.items():
            layout = torch.tensor((*packed.layout, *packed.shape), dtype=torch.int64)
            destination |= {f"{prefix}{name}.panels": packed.panels, f"{prefix}{name}.layout": layout}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self.sizes():
            parts = {k: state_dict.pop(f"{prefix}{name}.{k}", None) for k in QUANTIZED}
            if any(part is not None for part in parts.values()):
                self.load_quantized_(name, **parts)
        super()._load_from_state_dict(state_dict, prefix, *args)
