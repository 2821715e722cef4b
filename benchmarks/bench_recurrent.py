"""Recurrent layers and cells. A step multiplies the inputs and the state with weights of gates * hidden rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyllm import ops
from pyllm.benchmarks.timing import Case, modes

OPS = ("gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell")
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
SEQUENCES = {"rnn": torch.rnn_tanh, "gru": torch.gru, "lstm": torch.lstm}
CELLS = {"rnn": torch.rnn_tanh_cell, "gru": torch.gru_cell, "lstm": torch.lstm_cell}
LAYERS, TIME = 2, 128


def cases() -> Iterator[Case]:
    for name in GATES:
        for hidden in (128, 256, 1024):
            for batch in (1, 32):
                yield from _sequence(name, hidden, batch)
        yield from _cell(name, 256)


def _parameters(name: str, hidden: int, layers: int) -> list[torch.Tensor]:
    width = GATES[name] * hidden
    shapes = ((width, hidden), (width, hidden), (width,), (width,)) * layers
    return [torch.randn(shape) / hidden**0.5 for shape in shapes]


def _sequence(name: str, hidden: int, batch: int) -> Iterator[Case]:
    def ours(x, *params):
        return getattr(ops, name)(x, params, num_layers=LAYERS)[0]

    def theirs(x, *params):
        h = torch.zeros(LAYERS, batch, hidden)
        state = (h, h) if name == "lstm" else h
        return SEQUENCES[name](x, state, params, True, LAYERS, 0.0, torch.is_grad_enabled(), False, True)[0]

    x = torch.randn(batch, TIME, hidden)
    flops = 2 * LAYERS * TIME * batch * GATES[name] * hidden * 2 * hidden
    yield from modes(name, f"{LAYERS} layers, {batch} x {TIME} x {hidden} fp32", {"pyllm": ours, "torch": theirs},
                     (x, *_parameters(name, hidden, LAYERS)), flops=flops, backward=2,
                     measure=("forward", "forward+backward"))  # fmt: skip


def _cell(name: str, hidden: int) -> Iterator[Case]:
    def call(f):
        return lambda x, h, *params: f(x, (h, h) if name == "lstm" else h, *params)

    x, h = torch.randn(1, hidden), torch.randn(1, hidden)
    params = _parameters(name, hidden, 1)
    functions = {"pyllm": call(getattr(ops, name + "_cell")), "torch": call(CELLS[name])}
    yield from modes(name + "_cell", f"1 x {hidden} fp32", functions, (x, h, *params),
                     bytes=sum(p.nbytes for p in params))  # fmt: skip
