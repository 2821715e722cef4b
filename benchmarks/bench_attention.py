"""Attention: 2 products forward and 5 backward, 2 B H T^2 D operations each, half of them under a causal mask.

One query over a long past must read every key and value once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, Providers, modes
from pyllm.ops.paging import page_width

OPS = ("attention",)
SIZES = {  # (batch, positions, heads, head size)
    "tiny": [(2, 5, 2, 8)],
    "small": [(16, 128, 4, 64)],
    "usual": [(16, 128, 4, 64), (1, 512, 32, 64), (1, 2048, 32, 64)],
    "full": [(16, 128, 4, 32), (16, 128, 4, 64),
             *((1, length, 32, dim) for dim in (64, 128) for length in (128, 256, 512, 1024, 2048, 4096))],
}  # fmt: skip
QUERIES = {  # one query over (keys, heads, key/value heads, head size)
    "tiny": [(5, 4, 2, 8)],
    "small": [],
    "usual": [(4096, 32, 8, 64)],
    "full": [(4096, 32, 8, 64), (4096, 32, 8, 128)],
}
PAGES = {  # (batch, queries, keys, heads, key/value heads, head size), beside the same where keys lie in a row
    "tiny": [(2, 1, 70, 4, 2, 8)],
    "small": [],
    "usual": [(8, 1, 512, 14, 2, 64), (1, 128, 1024, 14, 2, 64)],
    "full": [(1, 1, 4096, 32, 8, 64), (8, 1, 512, 14, 2, 64), (32, 1, 512, 14, 2, 64), (1, 128, 1024, 14, 2, 64)],
}

INT8_PAGES = {  # the same, of int8, beside pages of the queries' dtype
    "tiny": [(2, 1, 70, 4, 2, 8)],
    "small": [],
    "usual": [(1, 1, 4096, 32, 8, 64)],
    "full": [(1, 1, 4096, 32, 8, 64), (1, 1, 4096, 32, 8, 128), (32, 1, 512, 14, 2, 64), (1, 128, 1024, 14, 2, 64)],
}


def cases(sizes: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for size in SIZES[sizes]:
            yield from _causal(*size, dtype)
        for size in QUERIES[sizes]:
            yield from _one_query(*size, dtype)
        for pages in PAGES[sizes]:
            yield _in_pages(*pages, dtype)
        for pages in INT8_PAGES[sizes]:
            yield _in_int8_pages(*pages, dtype)


def _torch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _causal(batch: int, length: int, heads: int, dim: int, dtype: str) -> Iterator[Case]:
    shape = (batch, length, heads, dim)
    functions: dict[str, Callable] = {
        "pyllm": lambda q, k, v: ops.attention(q, k, v, causal=True),
        "torch": lambda q, k, v: _torch(q, k, v, is_causal=True),
        "reference": lambda q, k, v: reference.attention(q, k, v, causal=True),
    }
    yield from modes("attention", f"{batch} x {length}, {heads} heads of {dim}, causal {dtype}", functions,
                     lambda: [torch.randn(shape).to(DTYPES[dtype]) for _ in range(3)],
                     flops=2 * batch * heads * length**2 * dim,
                     bytes=4 * batch * length * heads * dim * DTYPES[dtype].itemsize, backward=2.5)  # fmt: skip


def _one_query(keys: int, heads: int, kv_heads: int, dim: int, dtype: str) -> Iterator[Case]:
    shapes = (1, 1, heads, dim), (1, keys, kv_heads, dim), (1, keys, kv_heads, dim)
    functions: dict[str, Callable] = {
        "pyllm": lambda q, k, v: ops.attention(q, k, v, causal=True),
        "torch": lambda q, k, v: _torch(q, k, v, enable_gqa=True),
    }
    yield from modes("attention", f"one query, {keys} keys, {heads} heads of {dim} on {kv_heads} {dtype}", functions,
                     lambda: [torch.randn(shape).to(DTYPES[dtype]) for shape in shapes],
                     flops=4 * keys * heads * dim,
                     bytes=2 * keys * kv_heads * dim * DTYPES[dtype].itemsize)  # fmt: skip


def _in_pages(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: str) -> Case:
    def setup() -> Providers:
        q = torch.randn(batch, queries, heads, dim).to(DTYPES[dtype])
        count, lengths = -(-keys // ops.PAGE_TILE), torch.full((batch,), keys)
        table = torch.randperm(batch * count, dtype=torch.int32).view(batch, count)
        k, v = (torch.randn(table.numel(), ops.PAGE_TILE, kv_heads, dim).to(DTYPES[dtype]) for _ in range(2))
        rows = [t[table].flatten(1, 2)[:, :keys].contiguous() for t in (k, v)]
        return {
            "pyllm": lambda: ops.attention(q, k, v, causal=True, key_lengths=lengths, page_table=table),
            "not in pages": lambda: ops.attention(q, *rows, causal=True, key_lengths=lengths),
            "reference": lambda: reference.attention(q, k, v, causal=True, key_lengths=lengths, page_table=table),
        }

    label = f"{batch} x {queries}, {keys} keys in pages, {heads} heads of {dim} on {kv_heads} {dtype}"
    return Case("attention", label, setup, flops=4 * batch * queries * keys * heads * dim,
                bytes=2 * batch * keys * kv_heads * dim * DTYPES[dtype].itemsize, against="not in pages")  # fmt: skip


def _in_int8_pages(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: str) -> Case:
    width = page_width(dim, torch.int8)

    def setup() -> Providers:
        q = torch.randn(batch, queries, heads, dim).to(DTYPES[dtype])
        count, lengths = -(-keys // ops.PAGE_TILE), torch.full((batch,), keys)
        table = torch.randperm(batch * count, dtype=torch.int32).view(batch, count)
        rows = [torch.randn(table.numel(), ops.PAGE_TILE, kv_heads, dim) for _ in range(2)]
        positions = torch.arange(ops.PAGE_TILE).expand(table.numel(), -1)
        each = torch.arange(table.numel(), dtype=torch.int32)[:, None]
        int8 = [ops.write_pages(torch.zeros(*t.shape[:3], width, dtype=torch.int8), t, each, positions) for t in rows]
        plain = [reference.paging.numbers(t).to(DTYPES[dtype]) for t in int8]
        return {
            "pyllm": lambda: ops.attention(q, *int8, causal=True, key_lengths=lengths, page_table=table),
            "not in 8 bits": lambda: ops.attention(q, *plain, causal=True, key_lengths=lengths, page_table=table),
            "reference": lambda: reference.attention(q, *int8, causal=True, key_lengths=lengths, page_table=table),
        }

    label = f"{batch} x {queries}, {keys} keys in int8 pages, {heads} heads of {dim} on {kv_heads} {dtype}"
    return Case("attention", label, setup, flops=4 * batch * queries * keys * heads * dim,
                bytes=2 * batch * keys * kv_heads * width, against="not in 8 bits")  # fmt: skip
