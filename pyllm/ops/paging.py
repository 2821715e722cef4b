from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C

PAGE_TILE = _C.page_tile()  # a page of keys or values has a multiple of so many positions


def next_positions(lengths: Tensor, count: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Where the next `count` tokens of each sequence stand, and how many each has with them.

    Args:
        lengths: (B,), int64: how many tokens each sequence has.
        capacity: how many it may have.

    Returns:
        positions (B, count) and totals (B,), int64.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, or a sequence that would have more than `capacity`.
    """
    if count < 0:
        raise ValueError(f"[next_positions] count must be 0 or more, but got {count}")
    batch = len(lengths) if lengths.dim() else 0
    positions = lengths.new_empty(batch, count, dtype=torch.int64)
    totals = lengths.new_empty(batch, dtype=torch.int64)
    _C.next_positions(lengths, positions, totals, capacity)
    return positions, totals


def write_pages(pages: Tensor, rows: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    """Writes new keys or values into pages, in place, where `ops.attention` with the same page table finds them.

    Args:
        pages: (pages, page size, H, D), contiguous, float32, bfloat16 or float16.
        rows: (B, T, H, D), pages' dtype.
        page_table: (B, P), int32: position j of sequence b is row j % page size of page page_table[b, j // page size].
        positions: (B, T), int64 or int32; each row's own.

    Returns:
        pages.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, or a gradient that is asked for.
        IndexError: a position beyond the table, or an entry of it that names no page.
    """
    if torch.is_grad_enabled() and (pages.requires_grad or rows.requires_grad):
        raise ValueError("[write_pages] has no gradients: pages and rows must not require one "
                         "(call within torch.no_grad())")  # fmt: skip
    _C.write_pages(pages, rows if rows.stride(-1) == 1 else rows.contiguous(), page_table, positions.contiguous())
    return pages
