"""Linear: 2 m n k operations forward, twice that backward; the weight, x and the result each cross the memory once.

A packed weight is what inference multiplies by; packing reads it once and writes it once, as torch's copy does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, Providers, modes

OPS = ("linear", "pack_linear")
SIZES = {  # (rows, in, out)
    "tiny": [(3, 5, 7)],
    "small": [(2048, 256, 768)],
    "usual": [(512, 896, 4864), (32, 896, 4864), (1, 896, 4864), (1, 896, 151936), (2048, 256, 10000)],
    "full": [(512, 896, 4864), (32, 896, 4864), (1, 896, 4864), (1, 896, 151936), (2048, 256, 256),
             (2048, 256, 10000)],
}  # fmt: skip
PACKED = {
    "tiny": [(3, 5, 7)],
    "small": [],
    "usual": [(32, 896, 4864), (1, 896, 4864)],
    "full": [(512, 896, 4864), (32, 896, 4864), (1, 896, 4864), (1, 896, 151936)],
}


def cases(sizes: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for m, k, n in SIZES[sizes]:
            yield from _linear(m, k, n, dtype)
        for m, k, n in PACKED[sizes]:
            yield _packed(m, k, n, dtype)
        for k, n in dict.fromkeys((k, n) for _, k, n in PACKED[sizes]):
            yield from _pack(k, n, dtype)


def _linear(m: int, k: int, n: int, dtype: str) -> Iterator[Case]:
    functions: dict[str, Callable] = {"pyllm": ops.linear, "torch": F.linear, "reference": reference.linear}
    yield from modes("linear", f"{m} x {k} -> {n} {dtype}", functions,
                     lambda: [torch.randn(shape).to(DTYPES[dtype]) for shape in ((m, k), (n, k))],
                     flops=2 * m * n * k, bytes=_moved(m, k, n, dtype), backward=2 if m > 32 else None)  # fmt: skip


def _packed(m: int, k: int, n: int, dtype: str) -> Case:
    def setup() -> Providers:
        x, weight = (torch.randn(shape).to(DTYPES[dtype]) for shape in ((m, k), (n, k)))
        packed = ops.pack_linear(weight)
        return {"pyllm": lambda: ops.linear(x, packed), "torch": lambda: F.linear(x, weight)}

    return Case("linear", f"{m} x {k} -> {n}, packed {dtype}", setup, flops=2 * m * n * k,
                bytes=_moved(m, k, n, dtype))  # fmt: skip


def _pack(k: int, n: int, dtype: str) -> Iterator[Case]:
    functions: dict[str, Callable] = {"pyllm": lambda weight: ops.pack_linear(weight).panels, "torch": torch.clone}
    yield from modes("pack_linear", f"{k} -> {n} {dtype}", functions,
                     lambda: [torch.randn(n, k).to(DTYPES[dtype])],
                     bytes=2 * k * n * DTYPES[dtype].itemsize)  # fmt: skip


def _moved(m: int, k: int, n: int, dtype: str) -> int:
    return (m * k + n * k + m * n) * DTYPES[dtype].itemsize
