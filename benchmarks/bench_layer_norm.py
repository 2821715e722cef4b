"""Layer norm and rms norm. Forward must read x and write y; backward must read dy and x and write dx.

With a residual the forward pass must read that too, and write the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, modes

OPS = ("layer_norm", "rms_norm")
SIZES = {  # (rows, width)
    "tiny": [(3, 7)],
    "small": [(2048, 256)],
    "usual": [(1, 896), (512, 896), (4096, 4096)],
    "full": [(rows, width) for rows in (1, 32, 512, 4096) for width in (288, 896, 4096)],
}
RESIDUAL = {"tiny": [(3, 7)], "small": [], "usual": [(512, 896)], "full": [(1, 896), (512, 896), (4096, 4096)]}
TORCH: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda x, *weights: F.layer_norm(x, (x.shape[-1],), *weights),
    "rms_norm": lambda x, weight: F.rms_norm(x, (x.shape[-1],), weight, 1e-6),
}


def cases(sizes: str) -> Iterator[Case]:
    for op in OPS:
        for dtype in DTYPES:
            for rows, width in SIZES[sizes]:
                yield from _norm(op, rows, width, dtype)
            for rows, width in RESIDUAL[sizes]:
                yield from _norm_of_sum(op, rows, width, dtype)


def _norm(op: str, rows: int, width: int, dtype: str) -> Iterator[Case]:
    yield from modes(op, f"{rows} x {width} {dtype}",
                     {"pyllm": getattr(ops, op), "torch": TORCH[op], "reference": getattr(reference, op)},
                     lambda: [torch.randn(rows, width).to(DTYPES[dtype]), *_weights(op, width, dtype)],
                     bytes=2 * rows * width * DTYPES[dtype].itemsize, backward=1.5)  # fmt: skip


def _norm_of_sum(op: str, rows: int, width: int, dtype: str) -> Iterator[Case]:
    def theirs(x, residual, *weights):
        h = x + residual
        return TORCH[op](h, *weights), h

    functions = {"pyllm": lambda x, residual, *weights: getattr(ops, op)(x, *weights, residual=residual),
                 "torch": theirs}  # fmt: skip
    yield from modes(op, f"{rows} x {width}, of a sum {dtype}", functions,
                     lambda: [*torch.randn(2, rows, width).to(DTYPES[dtype]), *_weights(op, width, dtype)],
                     bytes=4 * rows * width * DTYPES[dtype].itemsize, backward=1.25)  # fmt: skip


def _weights(op: str, width: int, dtype: str) -> list[Tensor]:
    return [torch.randn(width).to(DTYPES[dtype]) for _ in range(2 if op == "layer_norm" else 1)]
