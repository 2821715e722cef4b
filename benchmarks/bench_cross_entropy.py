"""Cross-entropy. Forward must read the logits; backward must read them and write their gradient. The linear form must
multiply three times: the logits, and the gradients of x and weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, modes

OPS = ("cross_entropy", "linear_cross_entropy")
SIZES = {  # (rows, classes)
    "tiny": [(5, 11)],
    "small": [(2048, 1024)],
    "usual": [(2048, 512), (512, 151936)],
    "full": [(2048, 100), (2048, 512), (2048, 10000), (1024, 32000), (512, 151936)],
}
LINEAR_SIZES = {  # (rows, width, classes)
    "tiny": [(5, 8, 11)],
    "small": [(2048, 256, 1024)],
    "usual": [(2048, 256, 10000)],
    "full": [(2048, 256, 512), (2048, 256, 10000), (1024, 256, 32000), (512, 256, 151936)],
}


def cases(sizes: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, classes in SIZES[sizes]:
            yield from _cross_entropy(rows, classes, dtype)
        for rows, width, classes in LINEAR_SIZES[sizes]:
            yield from _linear_cross_entropy(rows, width, classes, dtype)


def _cross_entropy(rows: int, classes: int, dtype: str) -> Iterator[Case]:
    yield from modes("cross_entropy", f"{rows} x {classes} {dtype}",
                     {"pyllm": ops.cross_entropy, "torch": F.cross_entropy, "reference": reference.cross_entropy},
                     lambda: [torch.randn(rows, classes).to(DTYPES[dtype]), torch.randint(classes, (rows,))],
                     bytes=rows * classes * DTYPES[dtype].itemsize, backward=2)  # fmt: skip


def _linear_cross_entropy(rows: int, width: int, classes: int, dtype: str) -> Iterator[Case]:
    def tensors():
        x, weight = torch.randn(rows, width), torch.randn(classes, width).div(width**0.5)
        return x.to(DTYPES[dtype]), weight.to(DTYPES[dtype]), torch.randint(classes, (rows,))

    functions = {
        "pyllm": ops.linear_cross_entropy,
        "torch": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
        "reference": reference.linear_cross_entropy,
    }
    yield from modes("linear_cross_entropy", f"{rows} x {width} -> {classes} {dtype}", functions, tensors,
                     flops=2 * rows * width * classes, backward=2)  # fmt: skip
