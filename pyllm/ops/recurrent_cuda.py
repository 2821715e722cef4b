"""What of a recurrent layer is torch's on a CUDA device: every product that is not one of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, whatever they are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def products(op: str, x: Tensor, w_ih: Tensor, width: int) -> Tensor:
    """Those of x (T, B, I) with w_ih, (T * B, width) in float32."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"[{op}] x must be float32, bfloat16 or float16, but got {x.dtype}")
    expected = (width, x.shape[-1])
    if w_ih.dtype != x.dtype or w_ih.device != x.device:
        raise TypeError(f"[{op}] w_ih must be {x.dtype} on {x.device}, but got {w_ih.dtype} on {w_ih.device}")
    if w_ih.shape != expected:
        raise ValueError(f"[{op}] w_ih must have shape {expected}, but got {tuple(w_ih.shape)}")
    return product(x.flatten(0, 1), w_ih.T)


def backward(op, kind, reverse, x, w_ih, w_hh, h0, c0, lengths, y, gates, new_hidden, tanh_cell, cell, dy, dh_n, dc_n,
             dx, add_dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0) -> None:  # fmt: skip
    """`_C.recurrent_backward`, which fills dx and what follows it."""
    dsums = x.new_empty(gates.shape)
    dproducts = dsums if new_hidden is None else torch.empty_like(dsums)  # a gru's reset gate stands between them
    _C.recurrent_steps_backward(op, kind, reverse, w_hh, h0, c0, lengths, y, gates, new_hidden, tanh_cell, cell, dy,
                                dh_n, dc_n, dsums, None if new_hidden is None else dproducts, dh0, dc0)  # fmt: skip
    if dx is not None:
        rows = product(dsums, w_ih).view(x.shape)
        dx.add_(rows) if add_dx else dx.copy_(rows)
    if dw_ih is not None:
        dw_ih.copy_(product(dsums.T, x.flatten(0, 1)))
    if dw_hh is not None:
        dw_hh.copy_(_of_states(dproducts.view(*y.shape[:2], gates.shape[1]), y, h0, lengths, reverse))
    for bias, d in ((db_ih, dsums), (db_hh, dproducts)):
        if bias is not None:
            bias.copy_(d.sum(0, dtype=torch.float32))


def _of_states(d: Tensor, y: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The gradient of w_hh, (gates * H, H), of that of the products, d (T, B, gates * H): zeros where no step was."""
    later, before = (d[:-1], y[1:]) if reverse else (d[1:], y[:-1])
    total = product(later.flatten(0, 1).T, before.flatten(0, 1))
    if h0 is None or len(d) == 0:
        return total
    first = d[0] if not reverse else d[-1]
    if reverse and lengths is not None:
        first = d[(lengths - 1).clamp(0, len(d) - 1), torch.arange(d.shape[1], device=d.device)]
    return total + product(first.T, h0)
