"""RWKV-7's recurrence: a step costs five multiply-adds an element of the state, and ten backward. Torch has no such
operation: beside it stands the loop over steps that is written in it, the twin."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, modes

OPS = ("wkv",)
SIZES = {  # (batch, time, heads, dim)
    "tiny": [(2, 3, 2, 8)],
    "small": [(16, 128, 4, 64)],
    "usual": [(8, 1, 12, 64), (2, 128, 12, 64)],
    "full": [(1, 1, 12, 64), (8, 1, 12, 64), (2, 128, 12, 64), (16, 128, 4, 64), (1, 512, 12, 64), (1, 512, 1, 64)],
}


def cases(sizes: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for size in SIZES[sizes]:
            yield from _wkv(*size, dtype)


def _wkv(batch: int, time: int, heads: int, dim: int, dtype: str) -> Iterator[Case]:
    def tensors() -> list[Tensor]:
        r, w, k, v, a, rate = torch.randn(6, batch, time, heads, dim)
        a = -torch.nn.functional.normalize(a, dim=-1)
        inputs = (r, -0.6065 * w.sigmoid(), k / dim**0.5, v, a, -a * rate.sigmoid())
        return [*(t.to(DTYPES[dtype]) for t in inputs), torch.randn(batch, heads, dim, dim)]

    yield from modes("wkv", f"{batch} x {time} x {heads} x {dim} {dtype}", {"pyllm": ops.wkv, "torch": reference.wkv},
                     tensors, flops=10 * batch * time * heads * dim * dim, backward=2)  # fmt: skip
