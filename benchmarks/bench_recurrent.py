"""Recurrent layers and cells. A step multiplies the inputs and the state with weights of gates * hidden rows; quantised
ones are beside torch's in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case, Providers, modes

OPS = ("gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell")
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
TORCH: dict[str, Callable] = {"rnn": torch.rnn_tanh, "gru": torch.gru, "lstm": torch.lstm}
TORCH_CELLS: dict[str, Callable] = {"rnn": torch.rnn_tanh_cell, "gru": torch.gru_cell, "lstm": torch.lstm_cell}
SIZES = {  # (layers, batch, time, hidden)
    "tiny": [(2, 3, 5, 8)],
    "small": [(1, 16, 128, 256)],
    "usual": [(2, 1, 128, 256), (2, 32, 128, 256)],
    "full": [(2, batch, 128, hidden) for hidden in (128, 256, 512, 1024) for batch in (1, 32)],
}
CELL_SIZES = {  # (batch, hidden)
    "tiny": [(3, 8)],
    "small": [],
    "usual": [(1, 256)],
    "full": [(batch, hidden) for hidden in (128, 256, 512, 1024) for batch in (1, 32)],
}


def cases(sizes: str) -> Iterator[Case]:
    for name in GATES:
        for size in SIZES[sizes]:
            yield from _layers(name, *size)
            if sizes != "small":
                yield from (_quantised(name, *size, bits) for bits in (8, 4))
        for batch, hidden in CELL_SIZES[sizes]:
            yield from _cell(name, batch, hidden)


def _parameters(name: str, hidden: int, layers: int) -> list[torch.Tensor]:
    width = GATES[name] * hidden
    shapes = ((width, hidden), (width, hidden), (width,), (width,)) * layers
    return [torch.randn(shape) / hidden**0.5 for shape in shapes]


def _theirs(name: str, layers: int, batch: int, hidden: int) -> Callable:
    def call(x, *params):
        h = torch.zeros(layers, batch, hidden)
        state = (h, h) if name == "lstm" else h
        return TORCH[name](x, state, params, True, layers, 0.0, torch.is_grad_enabled(), False, True)[0]

    return call


def _layers(name: str, layers: int, batch: int, time: int, hidden: int) -> Iterator[Case]:
    functions = {
        "pyllm": lambda x, *params: getattr(ops, name)(x, params, num_layers=layers)[0],
        "torch": _theirs(name, layers, batch, hidden),
        "reference": lambda x, *params: getattr(reference, name)(x, params, num_layers=layers)[0],
    }
    yield from modes(name, f"{layers} layer{'s' * (layers > 1)}, {batch} x {time} x {hidden} fp32", functions,
                     lambda: [torch.randn(batch, time, hidden), *_parameters(name, hidden, layers)],
                     flops=2 * layers * time * batch * GATES[name] * hidden * 2 * hidden, backward=2)  # fmt: skip


def _quantised(name: str, layers: int, batch: int, time: int, hidden: int, bits: int) -> Case:
    def setup() -> Providers:
        x, params, groups = torch.randn(batch, time, hidden), _parameters(name, hidden, layers), -(-hidden // 32)

        def quantised(n: int) -> ops.QuantizedWeight:
            values = torch.randint(0, 256, (n, groups * 4 * bits), dtype=torch.uint8)
            scales = torch.full((n, groups), 2 / 2**bits / hidden**0.5, dtype=torch.float16)
            return ops.QuantizedWeight(values, scales, None, bits, (n, hidden))

        weights = {i: quantised(len(p)) for i, p in enumerate(params) if p.dim() == 2}
        ours = [ops.pack_quantized(weights[i]) if i in weights else p for i, p in enumerate(params)]
        dense = [weights[i].dequantize() if i in weights else p for i, p in enumerate(params)]
        theirs = _theirs(name, layers, batch, hidden)
        return {"pyllm": lambda: getattr(ops, name)(x, ours, num_layers=layers)[0], "torch": lambda: theirs(x, *dense)}

    return Case(name, f"{layers} layer{'s' * (layers > 1)}, {batch} x {time} x {hidden}, {bits} bits fp32", setup,
                flops=2 * layers * time * batch * GATES[name] * hidden * 2 * hidden)  # fmt: skip


def _cell(name: str, batch: int, hidden: int) -> Iterator[Case]:
    def call(f):
        return lambda x, h, *params: f(x, (h, h) if name == "lstm" else h, *params)

    weights = 2 * GATES[name] * hidden * (hidden + 1)
    yield from modes(name + "_cell", f"{batch} x {hidden} fp32",
                     {"pyllm": call(getattr(ops, name + "_cell")), "torch": call(TORCH_CELLS[name])},
                     lambda: [*torch.randn(2, batch, hidden), *_parameters(name, hidden, 1)],
                     flops=2 * batch * weights, bytes=4 * weights)  # fmt: skip
