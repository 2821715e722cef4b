from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops import recurrent_cuda
from pyllm.ops.gradients import Function, once_differentiable
from pyllm.ops.quantized_linear import PackedQuantizedWeight

Weight = Tensor | PackedQuantizedWeight
_NONLINEARITIES = {"tanh": 0, "relu": 1}
_GRU, _LSTM = 2, 3
_GATES = (1, 1, 3, 4)  # of each kind: blocks of rows in a weight


def rnn(x: Tensor, params: Sequence[Weight], h0: Tensor | None = None, *, nonlinearity: str = "tanh",
        num_layers: int = 1, bidirectional: bool = False, dropout: float = 0.0, training: bool = False,
        lengths: Tensor | None = None, batch_first: bool = True,
        seed: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Layers of a simple recurrent network (Elman, 1990): h' = tanh(w_ih x + b_ih + w_hh h + b_hh), or relu.

    A sequence's result has the same bits alone, in any batch, with any padding, for any number of threads, and when it
    is fed in pieces or cell by cell with its state carried: states are rounded to x's dtype at each step. On a CUDA
    device the products with w_ih, and the gradients of x and the parameters, are torch's (cuBLAS), which promises no
    such thing; gradients are rounded to x's dtype between steps; a wrong length is found by the device.

    Args:
        x: (B, T, I), or (T, B, I) where `batch_first` is false; float32, bfloat16 or float16.
        params: for each layer, for each direction: w_ih (H, I or D * H), w_hh (H, H) and, or not, b_ih (H,), b_hh (H,).
            This is the order of `torch.nn.RNN`'s parameters. x's dtype. A weight may come from `pack_quantized`
            instead: its products are those of `quantized_linear`, in float32, it has no gradient, and those of the rest
            go through the dequantised weight. On the CPU only.
        h0: (num_layers * D, B, H), where D is 2 if bidirectional, else 1. Zeros if not given.
        dropout: the share of each layer's outputs, but the last's, that becomes zero in training.
        lengths: (B,) int64 of 0 to T. Outputs beyond a sequence's length are zeros, its last state is the one there.
        seed: of the dropout's mask; torch's own generator if not given.

    Returns:
        y, (B, T, D * H) or (T, B, D * H), and h_n, shaped like h0.

    Raises:
        ValueError, TypeError: a shape, dtype, length or option that does not fit.
    """
    kind = _nonlinearity("rnn", nonlinearity)
    y, (h,) = _run("rnn", kind, x, params, (h0,), num_layers, bidirectional, dropout, training, lengths, batch_first,
                   seed)  # fmt: skip
    return y, h


def gru(x: Tensor, params: Sequence[Weight], h0: Tensor | None = None, *, num_layers: int = 1,
        bidirectional: bool = False, dropout: float = 0.0, training: bool = False, lengths: Tensor | None = None,
        batch_first: bool = True, seed: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Layers of gated recurrent units (Cho et al., 2014, https://arxiv.org/abs/1406.1078), as `torch.nn.GRU` has them.

    The reset gate scales the product of the hidden state. Weights have 3 * H rows (reset, update, new). The rest is as
    in `rnn`.
    """
    y, (h,) = _run("gru", _GRU, x, params, (h0,), num_layers, bidirectional, dropout, training, lengths, batch_first,
                   seed)  # fmt: skip
    return y, h


def lstm(x: Tensor, params: Sequence[Weight], state: tuple[Tensor, Tensor] | None = None, *, num_layers: int = 1,
         bidirectional: bool = False, dropout: float = 0.0, training: bool = False, lengths: Tensor | None = None,
         batch_first: bool = True, seed: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Layers of long short-term memory (Hochreiter and Schmidhuber, 1997; with forget gates, Gers et al., 2000).

    Weights have 4 * H rows (input, forget, cell, output), as in `torch.nn.LSTM`. The state is a pair (h, c), each as h0
    in `rnn`; the rest is as there.
    """
    y, (h, c) = _run("lstm", _LSTM, x, params, (None, None) if state is None else state, num_layers, bidirectional,
                     dropout, training, lengths, batch_first, seed)  # fmt: skip
    return y, (h, c)


def rnn_cell(x: Tensor, h: Tensor, w_ih: Weight, w_hh: Weight, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
             *, nonlinearity: str = "tanh") -> Tensor:  # fmt: skip
    """One step of `rnn`: x (B, I), h (B, H), of any strides; returns the next h, with the sequence's bits."""
    return _cell("rnn_cell", _nonlinearity("rnn_cell", nonlinearity), x, h, None, w_ih, w_hh, b_ih, b_hh)[0]


def gru_cell(x: Tensor, h: Tensor, w_ih: Weight, w_hh: Weight, b_ih: Tensor | None = None,
             b_hh: Tensor | None = None) -> Tensor:  # fmt: skip
    """One step of `gru`: x (B, I), h (B, H), of any strides; returns the next h, with the sequence's bits."""
    return _cell("gru_cell", _GRU, x, h, None, w_ih, w_hh, b_ih, b_hh)[0]


def lstm_cell(x: Tensor, state: tuple[Tensor, Tensor], w_ih: Weight, w_hh: Weight, b_ih: Tensor | None = None,
              b_hh: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of `lstm`: x (B, I), state (h, c) of (B, H) each; returns the next state, with the sequence's bits."""
    return _cell("lstm_cell", _LSTM, x, state[0], state[1], w_ih, w_hh, b_ih, b_hh)


def _nonlinearity(op: str, name: str) -> int:
    if name not in _NONLINEARITIES:
        raise ValueError(f"[{op}] nonlinearity must be 'tanh' or 'relu', but got {name!r}")
    return _NONLINEARITIES[name]


def _differentiable(*given: Tensor | PackedQuantizedWeight | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)


def _cell(op, kind, x, h, c, w_ih, w_hh, b_ih, b_hh):
    differentiable = _differentiable(x, h, c, w_ih, w_hh, b_ih, b_hh)
    if differentiable or _on_cuda(x) or _is_packed(w_ih) or _is_packed(w_hh):
        if x.dim() != 2 or h.dim() != 2:
            raise ValueError(f"[{op}] x and h must have 2 dimensions, but got {tuple(x.shape)} and {tuple(h.shape)}")
        c = None if c is None else c[None]
        apply = _Layer.apply if differentiable else _forward
        _, h_n, c_n = apply(op, kind, 1, None, x[None], h[None], c, w_ih, w_hh, b_ih, b_hh)[:3]
        return h_n[0], None if c_n is None else c_n[0]
    h_n = torch.empty_like(h, dtype=x.dtype, memory_format=torch.contiguous_format)
    c_n = None if c is None else torch.empty_like(h_n)
    _C.recurrent_cell(op, kind, x, h, c, w_ih, w_hh, b_ih, b_hh, h_n, c_n)
    return h_n, c_n


def _run(op, kind, x, params, state, num_layers, bidirectional, dropout, training, lengths, batch_first, seed):
    directions = 2 if bidirectional else 1
    layers = num_layers * directions
    if x.dim() != 3:
        raise ValueError(f"[{op}] x must have 3 dimensions, but got {tuple(x.shape)}")
    if num_layers < 1 or len(params) not in (2 * layers, 4 * layers):
        raise ValueError(
            f"[{op}] params must be {2 * layers} or {4 * layers} tensors (w_ih, w_hh and, or not, b_ih, b_hh for each "
            f"of {num_layers} layers x {directions} directions), but got {len(params)}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"[{op}] dropout must be at least 0 and less than 1, but got {dropout}")
    for t in state:
        if t is not None and (t.dim() != 3 or t.shape[0] != layers):
            raise ValueError(f"[{op}] a state must have shape ({layers}, B, H), but got {tuple(t.shape)}")
    y = x.transpose(0, 1) if batch_first else x
    if lengths is not None and lengths.shape != y.shape[1:2]:
        raise ValueError(f"[{op}] lengths must have shape ({y.shape[1]},), but got {tuple(lengths.shape)}")
    if lengths is not None:  # what the padding holds, perhaps NaN, must not reach the gradients of the weights
        y = y.masked_fill((torch.arange(y.shape[0], device=y.device)[:, None] >= lengths)[..., None], 0)
    y = y.contiguous()
    differentiable = _differentiable(x, *params, *state)
    apply = _Layer.apply if differentiable else _forward
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    per = len(params) // num_layers
    last = []
    for layer in range(num_layers):
        if layer and training and dropout:
            shape = (y.shape[1], y.shape[0], y.shape[2])  # batch first, whatever x is
            device = y.device if generator is None else None  # a seed draws the same everywhere
            kept = torch.rand(shape, generator=generator, dtype=torch.float32, device=device) >= dropout
            y = y * kept.to(y.device).transpose(0, 1) / (1 - dropout)
        h0, c0 = (None if t is None else t[layer * directions : (layer + 1) * directions] for t in (*state, None)[:2])
        y, *states = apply(op, kind, directions, lengths, y, h0, c0, *params[layer * per : (layer + 1) * per])[:3]
        last.append(states)
    last = [torch.cat(t) if num_layers > 1 else t[0] for t in list(zip(*last, strict=True))[: len(state)]]
    return y.transpose(0, 1).contiguous() if batch_first else y, last


def _is_packed(weight) -> bool:
    return isinstance(weight, PackedQuantizedWeight)


def _parts(weight):
    """What the kernel takes of a weight: a tensor and, where it is packed, how."""
    return (weight.panels, (*weight.layout, *weight.shape)) if _is_packed(weight) else (weight, ())


def _sides(params, directions):
    """For each direction: w_ih, w_hh, b_ih, b_hh."""
    per = len(params) // directions
    return [(*params[i * per : (i + 1) * per], None, None)[:4] for i in range(directions)]


def _forward(op, kind, directions, lengths, x, h0, c0, *params, keep=False):
    """One layer, time first; returns y, h_n, c_n and what each direction keeps for the backward pass."""
    if len(params[1].shape) != 2:
        raise ValueError(f"[{op}] w_hh must have 2 dimensions, but got {tuple(params[1].shape)}")
    (time, batch, _), hidden = x.shape, params[1].shape[1]
    on_cuda = _on_cuda(x)
    if on_cuda and any(map(_is_packed, params)):
        raise NotImplementedError(f"[{op}] x must be on the CPU where weights are quantised, but is on {x.device}")
    y = x.new_empty(time, batch, directions * hidden)
    h_n = x.new_empty(directions, batch, hidden)
    c_n = torch.empty_like(h_n) if kind == _LSTM else None
    kept = []
    for d, (w_ih, w_hh, b_ih, b_hh) in enumerate(_sides(params, directions)):
        gates = recurrent_cuda.products(op, x, w_ih, _GATES[kind] * hidden) if on_cuda else None
        activations = (None,) * 4
        if keep:
            rows = time * batch
            gates = x.new_empty(rows, w_hh.shape[0], dtype=torch.float32) if gates is None else gates
            part = x.new_empty(rows, hidden, dtype=torch.float32) if kind >= _GRU else None
            cell = x.new_empty(rows, hidden) if kind == _LSTM else None
            activations = (gates, part, None, None) if kind == _GRU else (gates, None, part, cell)
        initial, last = ([None if t is None else t[d] for t in pair] for pair in ((h0, c0), (h_n, c_n)))
        columns = y[..., d * hidden : (d + 1) * hidden]
        if on_cuda:
            _C.recurrent_steps(op, kind, d == 1, gates, w_hh, b_ih, b_hh, *initial, lengths, columns, *last, keep,
                               *activations[1:])  # fmt: skip
        else:
            weights, formats = zip(*(_parts(w) for w in (w_ih, w_hh)), strict=True)
            _C.recurrent_forward(op, kind, d == 1, x, *weights, *formats, b_ih, b_hh, *initial, lengths, columns, *last,
                                 *activations)  # fmt: skip
        kept += activations
    return y, h_n, c_n, kept


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda or _C.emulating_cuda()


class _Layer(Function):
    @staticmethod
    def forward(ctx, op, kind, directions, lengths, x, h0, c0, *params):
        y, h_n, c_n, kept = _forward(op, kind, directions, lengths, x, h0, c0, *params, keep=True)
        ctx.op, ctx.kind, ctx.directions, ctx.on_cuda = op, kind, directions, _on_cuda(x)
        ctx.set_materialize_grads(False)
        ctx.packed = [p if _is_packed(p) else None for p in params]
        params = [None if _is_packed(p) else p for p in params]
        ctx.save_for_backward(lengths, x, h0, c0, y, *params, *kept)
        return y, h_n, c_n

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh_n, dc_n):
        lengths, x, h0, c0, y, *rest = ctx.saved_tensors
        op, kind, directions = ctx.op, ctx.kind, ctx.directions
        params, kept = rest[: -4 * directions], rest[-4 * directions :]
        params = [
            p if packed is None else packed.unpack().dequantize().to(x.dtype)
            for p, packed in zip(params, ctx.packed, strict=True)
        ]
        _, _, _, _, needs_x, needs_h0, needs_c0, *needs = ctx.needs_input_grad
        hidden, per = params[1].shape[1], len(params) // directions
        # Two directions add up in float32.
        dx = x.new_empty(*x.shape, dtype=x.dtype if directions == 1 else torch.float32) if needs_x else None
        dh0, dc0 = (t.new_empty(*t.shape) if n else None for t, n in ((h0, needs_h0), (c0, needs_c0)))
        dparams = [p.new_empty(*p.shape) if n else None for p, n in zip(params, needs, strict=True)]
        dy = dy if dy is None or dy.stride(-1) == 1 else dy.contiguous()
        dh_n, dc_n = (None if t is None else t.contiguous() for t in (dh_n, dc_n))
        run = recurrent_cuda.backward if ctx.on_cuda else _C.recurrent_backward
        for d in range(directions):
            w_ih, w_hh = params[d * per : d * per + 2]
            columns = slice(d * hidden, (d + 1) * hidden)
            side = [None if t is None else t[d] for t in (h0, c0, dh_n, dc_n, dh0, dc0)]
            gradients = (*dparams[d * per : (d + 1) * per], None, None)[:4]
            run(op, kind, d == 1, x, w_ih, w_hh, *side[:2], lengths, y[..., columns], *kept[4 * d : 4 * d + 4],
                None if dy is None else dy[..., columns], *side[2:4], dx, d == 1, *gradients, *side[4:])  # fmt: skip
        return None, None, None, None, None if dx is None else dx.to(x.dtype), dh0, dc0, *dparams
