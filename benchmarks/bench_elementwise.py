"""Copies and plain arithmetic: what they read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, Providers

OPS = ("elementwise",)
SIZES = {
    "tiny": [(3, 7)],
    "small": [],
    "usual": [(512, 896)],
    "full": [(1, 896), (32, 896), (512, 896), (4096, 4096)],
}
TORCH: dict[str, Callable] = {"copy": lambda a, b: a.clone(), "add": torch.add, "multiply": torch.mul}


def cases(sizes: str) -> Iterator[Case]:
    for kind in TORCH:
        for dtype in DTYPES:
            for rows, width in SIZES[sizes]:
                yield _elementwise(kind, rows, width, dtype)


def _elementwise(kind: str, rows: int, width: int, dtype: str) -> Case:
    count = 1 if kind == "copy" else 2

    def setup() -> Providers:
        a, b = (torch.randn(rows, width).to(DTYPES[dtype]) for _ in range(2))
        given = (kind, a) if kind == "copy" else (kind, a, b)
        return {
            "pyllm": lambda: ops.elementwise(*given),
            "torch": lambda: TORCH[kind](a, b),
            "reference": lambda: reference.elementwise(*given),
        }

    size = rows * width * DTYPES[dtype].itemsize
    return Case("elementwise", f"{kind}, {rows} x {width} {dtype}", setup, bytes=(count + 1) * size)
