from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyllm.reference.linear import linear
from pyllm.reference.quantized_linear import quantized_linear

State = tuple[Tensor, ...]

# A step computes in float32 and rounds its state to x's dtype, the cell state before the hidden one is made of it: what
# a sequence carries from step to step is what a caller of the cells holds.


def rnn_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
             *, nonlinearity: str = "tanh") -> Tensor:  # fmt: skip
    a = _sums(x, w_ih, b_ih) + _sums(h, w_hh, b_hh)
    return (a.tanh() if nonlinearity == "tanh" else a.relu()).to(x.dtype)


def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
             b_hh: Tensor | None = None) -> Tensor:  # fmt: skip
    (ir, iz, inew), (hr, hz, hnew) = _sums(x, w_ih, b_ih).chunk(3, -1), _sums(h, w_hh, b_hh).chunk(3, -1)
    z = (iz + hz).sigmoid()
    return ((1 - z) * (inew + (ir + hr).sigmoid() * hnew).tanh() + z * h).to(x.dtype)


def lstm_cell(x: Tensor, state: tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
              b_hh: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    i, f, g, o = (_sums(x, w_ih, b_ih) + _sums(state[0], w_hh, b_hh)).chunk(4, -1)
    c = (f.sigmoid() * state[1] + i.sigmoid() * g.tanh()).to(x.dtype)
    return (o.sigmoid() * c.to(o.dtype).tanh()).to(x.dtype), c


def _sums(x: Tensor, weight, bias: Tensor | None) -> Tensor:
    """`weight`: a tensor, or an unpacked `QuantizedWeight`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    if isinstance(weight, Tensor):
        return linear(x.to(wide), weight.to(wide), bias)
    return quantized_linear(x.to(wide), weight, bias)


def rnn(x: Tensor, params: Sequence[Tensor], h0: Tensor | None = None, *, nonlinearity: str = "tanh",
        **options) -> tuple[Tensor, Tensor]:  # fmt: skip
    def step(x, s, *p):
        return (rnn_cell(x, s[0], *p, nonlinearity=nonlinearity),)

    output, (h,) = _run(step, x, params, None if h0 is None else (h0,), 1, **options)
    return output, h


def gru(x: Tensor, params: Sequence[Tensor], h0: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    output, (h,) = _run(lambda x, s, *p: (gru_cell(x, s[0], *p),), x, params, None if h0 is None else (h0,), 1,
                        **options)  # fmt: skip
    return output, h


def lstm(x: Tensor, params: Sequence[Tensor], state: tuple[Tensor, Tensor] | None = None,
         **options) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    output, (h, c) = _run(lstm_cell, x, params, state, 2, **options)
    return output, (h, c)


def _run(step: Callable[..., State], x: Tensor, params: Sequence[Tensor], state: State | None, states: int, *,
         num_layers: int = 1, bidirectional: bool = False, dropout: float = 0.0, training: bool = False,
         lengths: Tensor | None = None, batch_first: bool = True,
         seed: int | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """params: for each layer and direction w_ih, w_hh (and b_ih, b_hh); state: (layers * directions, B, H) each."""
    directions = 2 if bidirectional else 1
    per = len(params) // (num_layers * directions)
    out = x if batch_first else x.transpose(0, 1)
    batch, time, hidden = out.shape[0], out.shape[1], params[1].shape[1]
    if state is None:
        state = (x.new_zeros(num_layers * directions, batch, hidden),) * states
    lengths = torch.full((batch,), time, device=x.device) if lengths is None else lengths
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    last = []
    for layer in range(num_layers):
        if layer and training and dropout:
            device = out.device if generator is None else None  # a seed draws the same everywhere
            kept = torch.rand(out.shape, generator=generator, dtype=torch.float32, device=device) >= dropout
            out = out * kept.to(out.device) / (1 - dropout)
        sides = []
        for d in range(directions):
            n = layer * directions + d
            p = params[n * per : (n + 1) * per]
            s, steps = tuple(t[n] for t in state), [x.new_zeros(batch, hidden)] * time
            for t in reversed(range(time)) if d else range(time):
                live = (t < lengths)[:, None]
                new = step(out[:, t], s, *p)
                s = tuple(torch.where(live, a, b) for a, b in zip(new, s, strict=True))
                steps[t] = torch.where(live, s[0], 0)
            sides.append(torch.stack(steps, 1) if time else out.new_zeros(batch, 0, hidden))
            last.append(s)
        out = torch.cat(sides, -1)
    out = out if batch_first else out.transpose(0, 1)
    return out, tuple(torch.stack(s) for s in zip(*last, strict=True))
