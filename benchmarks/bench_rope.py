"""Rope: each pass must read x and write the result. torch's provider is given its tables of sines and cosines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, modes

OPS = ("rope",)
SIZES = {  # (batch, time, heads, head size)
    "tiny": [(2, 5, 2, 8)],
    "small": [(16, 128, 4, 64)],
    "usual": [(1, 1, 32, 64), (1, 512, 32, 64)],
    "full": [(1, 1, 32, 64), (1, 512, 32, 64), (8, 512, 16, 64), (32, 1, 32, 128)],
}


def cases(sizes: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for size in SIZES[sizes]:
            yield from _rope(*size, dtype)


def _rope(batch: int, time: int, heads: int, width: int, dtype: str) -> Iterator[Case]:
    positions = torch.arange(time)
    angle = positions[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.cat((angle, angle), -1)[:, None]
    cos, sin = angle.cos().to(DTYPES[dtype]), angle.sin().to(DTYPES[dtype])

    def by_torch(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    functions: dict[str, Callable] = {
        "pyllm": lambda x: ops.rope(x, positions),
        "torch": by_torch,
        "reference": lambda x: reference.rope(x, positions),
    }
    yield from modes("rope", f"{batch} x {time} x {heads} x {width} {dtype}", functions,
                     lambda: [torch.randn(batch, time, heads, width).to(DTYPES[dtype])],
                     bytes=2 * batch * time * heads * width * DTYPES[dtype].itemsize, backward=1)  # fmt: skip
