"""Quantised linear beside fp32 torch: what a user of either would choose between. The weight's bytes cross the memory
once, which is the limit for few rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyllm import ops
from pyllm.benchmarks.timing import Case, modes

OPS = ("quantized_linear",)
SIZES = [(1, 896, 4864), (1, 896, 151936), (8, 896, 4864), (32, 896, 4864), (512, 896, 4864)]


def cases() -> Iterator[Case]:
    for bits in (8, 4):
        for m, k, n in SIZES:
            x, dense = torch.randn(m, k), torch.randn(n, k)
            values = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
            weight = ops.pack_quantized(ops.QuantizedWeight(values, torch.rand(n, k // 32).half(), None, bits, (n, k)))
            yield from modes("quantized_linear", f"{m} x {k} -> {n} {bits} bits",
                             {"pyllm": lambda x, w=weight: ops.quantized_linear(x, w),
                              "torch": lambda x, w=dense: F.linear(x, w)},
                             (x,), flops=2 * m * n * k, bytes=weight.panels.numel() + (m * k + m * n) * 4,
                             backward=None)  # fmt: skip
