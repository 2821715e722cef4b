"""Activations. Forward reads its inputs and writes y; backward reads dy and the inputs and writes their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, modes

OPS = ("gelu", "silu", "geglu", "swiglu", "relu_squared", "sigmoid", "tanh")
SIZES = {
    "tiny": [(3, 7)],
    "small": [(2048, 1024)],
    "usual": [(512, 4864)],
    "full": [(1, 896), (1, 4864), (32, 4864), (512, 4864), (4096, 4864)],
}
TORCH: dict[str, Callable] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def cases(sizes: str) -> Iterator[Case]:
    for op in OPS:
        for dtype in DTYPES:
            for rows, width in SIZES[sizes]:
                yield from _activation(op, rows, width, dtype)


def _activation(op: str, rows: int, width: int, dtype: str) -> Iterator[Case]:
    count = 2 if "glu" in op else 1
    yield from modes(op, f"{rows} x {width} {dtype}",
                     {"pyllm": getattr(ops, op), "torch": TORCH[op], "reference": getattr(reference, op)},
                     lambda: [torch.randn(rows, width).to(DTYPES[dtype]) for _ in range(count)],
                     bytes=(count + 1) * rows * width * DTYPES[dtype].itemsize,
                     backward=(2 * count + 1) / (count + 1))  # fmt: skip
