"""Rope: each pass must read x and write the result. torch's provider is given its tables of sines and cosines."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case, modes

OPS = ("rope",)
SIZES = [(1, 1, 32, 64), (1, 512, 32, 64), (8, 512, 16, 64), (32, 1, 32, 128)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    for dtype_name, dtype in DTYPES.items():
        for batch, length, heads, width in SIZES:
            x, positions = torch.randn(batch, length, heads, width).to(dtype), torch.arange(length)
            angle = positions[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
            angle = torch.cat((angle, angle), -1)[:, None]
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

            def by_torch(x, cos=cos, sin=sin):
                a, b = x.chunk(2, -1)
                return x * cos + torch.cat((-b, a), -1) * sin

            providers = {
                "pyllm": lambda x, positions=positions: ops.rope(x, positions),
                "torch": by_torch,
                "reference": lambda x, positions=positions: reference.rope(x, positions),
            }
            yield from modes("rope", f"{batch} x {length} x {heads} x {width} {dtype_name}", providers, (x,),
                             bytes=2 * x.nbytes, backward=1)  # fmt: skip
