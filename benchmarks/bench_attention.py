"""Attention: 2 products forward and 5 backward, 2 B H T^2 D operations each, half of them under a causal mask.

One query over a long past must read every key and value once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops
from pyllm.benchmarks.timing import Case, modes

OPS = ("attention",)
# (batch, positions, heads, head size)
SIZES = [(16, 128, 4, 32), (16, 128, 4, 64), (1, 128, 32, 64), (1, 512, 32, 64), (1, 2048, 32, 64), (1, 4096, 32, 64),
         (1, 128, 32, 128), (1, 1024, 32, 128), (1, 4096, 32, 128)]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _torch(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)


def cases() -> Iterator[Case]:
    for dtype_name, dtype in DTYPES.items():
        for batch, length, heads, dim in SIZES:
            q, k, v = (torch.randn(batch, length, heads, dim).to(dtype) for _ in range(3))
            functions: dict[str, Callable] = {
                "pyllm": lambda q, k, v: ops.attention(q, k, v, causal=True),
                "torch": lambda q, k, v: _torch(q, k, v, is_causal=True),
            }
            yield from modes("attention", f"{batch} x {length}, {heads} heads of {dim}, causal {dtype_name}", functions,
                             (q, k, v), flops=2 * batch * heads * length**2 * dim, bytes=4 * q.nbytes, backward=2.5,
                             measure=("forward", "forward+backward"))  # fmt: skip
        for dim in (64, 128):
            q, (k, v) = torch.randn(1, 1, 32, dim).to(dtype), (torch.randn(1, 4096, 8, dim).to(dtype) for _ in range(2))
            functions = {
                "pyllm": lambda q, k, v: ops.attention(q, k, v, causal=True),
                "torch": lambda q, k, v: _torch(q, k, v, enable_gqa=True),
            }
            yield from modes("attention", f"one query, 4096 keys, 32 heads of {dim} on 8 {dtype_name}", functions,
                             (q, k, v), flops=4 * 4096 * 32 * dim, bytes=2 * k.nbytes)  # fmt: skip
