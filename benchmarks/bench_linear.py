"""Linear: 2 m n k operations forward, twice that backward; the weight, x and the result each cross the memory once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyllm import ops
from pyllm.benchmarks.timing import Case, modes

OPS = ("linear",)
SIZES = [(1, 896, 4864), (1, 896, 151936), (32, 896, 4864), (512, 896, 4864), (2048, 256, 256), (2048, 256, 10000)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    for dtype_name, dtype in DTYPES.items():
        for m, k, n in SIZES:
            x, weight = (torch.randn(shape).to(dtype) for shape in ((m, k), (n, k)))
            moved = (m * k + n * k + m * n) * x.element_size()
            yield from modes("linear", f"{m} x {k} -> {n} {dtype_name}", {"pyllm": ops.linear, "torch": F.linear},
                             (x, weight), flops=2 * m * n * k, bytes=moved,
                             backward=2 if m > 32 else None)  # fmt: skip
