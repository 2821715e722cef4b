from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x times the standard normal distribution's mass below x (Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415).

    Args:
        x: any shape, float32, bfloat16 or float16.
        approximate: "none", or "tanh" for the paper's approximation.

    Returns:
        Shaped and typed like x.

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit.
    """
    return _activation("gelu", _gelu_kind("gelu", approximate), x, None)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) (Elfwing et al., 2017, https://arxiv.org/abs/1702.03118); x, result and errors as in `gelu`."""
    return _activation("silu", "silu", x, None)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); x, result and errors as in `gelu`."""
    return _activation("sigmoid", "sigmoid", x, None)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent; x, result and errors as in `gelu`."""
    return _activation("tanh", "tanh", x, None)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al., 2021, https://arxiv.org/abs/2109.08668); x, result and errors as in `gelu`."""
    return _activation("relu_squared", "relu_squared", x, None)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(gate) * up (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

    Args:
        gate, up: of one shape and dtype, float32, bfloat16 or float16. The two halves of the last dimension of one
            tensor, as from `chunk(2, -1)`, are read where they are.
        approximate: as in `gelu`.

    Returns:
        Shaped and typed like gate.

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit.
    """
    return _activation("geglu", _gelu_kind("geglu", approximate), gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020, https://arxiv.org/abs/2002.05202); arguments, result and errors as in `geglu`."""
    return _activation("swiglu", "silu", gate, up)


def _gelu_kind(op: str, approximate: str) -> str:
    if approximate not in _GELU:
        raise ValueError(f"[{op}] approximate must be 'none' or 'tanh', but got {approximate!r}")
    return _GELU[approximate]


def _activation(op: str, kind: str, gate: Tensor, up: Tensor | None) -> Tensor:
    whole = gate.is_contiguous()
    if not whole:
        gate = _rows(gate)
    if up is not None:
        up = _rows(up)
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        return _Activation.apply(gate, up, (op, kind))
    # a memory format that is spelled out costs a call 0.2 us
    out = torch.empty_like(gate) if whole else torch.empty_like(gate, memory_format=torch.contiguous_format)
    _C.activation_forward(gate, up, out, op, kind)
    return out


def _rows(t: Tensor) -> Tensor:
    return t if t.is_contiguous() or (t.dim() and t.stride(-1) == 1) else t.contiguous()


class _Activation(Function):
    @staticmethod
    def forward(ctx, gate, up, names):
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _C.activation_forward(gate, up, out, *names)
        ctx.save_for_backward(gate, up)
        ctx.names = names
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        dup = None if up is None else torch.empty_like(up, memory_format=torch.contiguous_format)
        _C.activation_backward(_rows(dy), gate, up, dgate, dup, *ctx.names)
        return dgate, dup, None
