"""Keys and values in pages: where new ones stand, and writing them. What reading them takes is in bench_attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, Providers

OPS = ("next_positions", "write_pages")
SIZES = {  # (batch, new positions, positions, key/value heads, head size)
    "tiny": [(2, 1, 70, 2, 8)],
    "small": [],
    "usual": [(8, 1, 512, 2, 64), (1, 128, 1024, 2, 64)],
    "full": [(8, 1, 512, 2, 64), (1, 1, 4096, 8, 64), (32, 1, 512, 2, 64), (1, 128, 1024, 2, 64)],
}


def cases(sizes: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for size in SIZES[sizes]:
            yield _write(*size, dtype)
    for batch, count, keys, *_ in SIZES[sizes]:
        yield _positions(batch, count, keys)


def _table(batch: int, keys: int) -> torch.Tensor:
    count = -(-keys // ops.PAGE_TILE)
    return torch.randperm(batch * count, dtype=torch.int32).view(batch, count)


def _write(batch: int, count: int, keys: int, kv_heads: int, dim: int, dtype: str) -> Case:
    def setup() -> Providers:
        table = _table(batch, keys)
        pages = torch.zeros(table.numel(), ops.PAGE_TILE, kv_heads, dim, dtype=DTYPES[dtype])
        rows = torch.randn(batch, count, kv_heads, dim).to(DTYPES[dtype])
        positions = torch.arange(keys - count, keys).repeat(batch, 1)
        return {
            "pyllm": lambda: ops.write_pages(pages, rows, table, positions),
            "torch": lambda: reference.write_pages(pages, rows, table, positions),
        }

    return Case("write_pages", f"{batch} x {count}, {kv_heads} heads of {dim} {dtype}", setup,
                bytes=2 * batch * count * kv_heads * dim * DTYPES[dtype].itemsize)  # fmt: skip


def _positions(batch: int, count: int, keys: int) -> Case:
    def setup() -> Providers:
        lengths = torch.full((batch,), keys - count)
        return {
            "pyllm": lambda: ops.next_positions(lengths, count, keys),
            "torch": lambda: reference.next_positions(lengths, count, keys),
        }

    return Case("next_positions", f"{batch} x {count}", setup, bytes=8 * batch * (count + 2))
