from __future__ import annotations

import math

import torch
from torch import Tensor


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _gelu(wide, approximate).to(x.dtype)


def relu_squared(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).relu().square().to(x.dtype)


def sigmoid(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).sigmoid().to(x.dtype)


def tanh(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).tanh().to(x.dtype)


def silu(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * wide.sigmoid()).to(x.dtype)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_gelu(gate.to(wide), approximate) * up.to(wide)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (gate.to(wide) * gate.to(wide).sigmoid() * up.to(wide)).to(gate.dtype)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return 0.5 * x * torch.erfc(-x * math.sqrt(0.5))
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"[gelu] approximate must be 'none' or 'tanh', but got {approximate!r}")
