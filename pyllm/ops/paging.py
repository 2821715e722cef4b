from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C

PAGE_TILE = _C.page_tile()  # a page of keys or values has a multiple of so many positions
INT8_GROUP = 32  # numbers of an int8 page that share a scale


def page_width(head_size: int, dtype: torch.dtype) -> int:
    """The last size of pages: a head's numbers and, where they are int8, 2 bytes for the scale of each group of 32. How
    those of int8 lie is between `write_pages` and `attention`."""
    return head_size + (2 * -(-head_size // INT8_GROUP) if dtype == torch.int8 else 0)


def head_size(pages: Tensor) -> int:
    """How many numbers a head has in pages, of which `page_width` is the last size."""
    width = pages.shape[-1]
    return width - 2 * -(-width // (INT8_GROUP + 2)) if pages.dtype == torch.int8 else width


def new_pages(count: int, page_size: int, num_heads: int, head_size: int, *, dtype: torch.dtype,
              device: torch.device) -> Tensor:  # fmt: skip
    """Pages of zeros, (count, page_size, num_heads, `page_width`). On the CPU the system is asked for large pages of
    memory: each step reads the keys and values of all sequences, of which hardly anything is in a cache."""
    pages = torch.zeros(count, page_size, num_heads, page_width(head_size, dtype), dtype=dtype, device=device)
    if pages.device.type == "cpu":
        _C.prefer_large_pages(pages)
    return pages


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

    Pages of int8 hold them in 8 bits: each group of 32 numbers of a head, the last perhaps of fewer, is rounded to
    multiples, of -127 to 127, of a bfloat16 scale of its own: its largest number / 127, rounded up. A group with a
    number that is not finite is NaN.

    Args:
        pages: (pages, page size, H, D), contiguous, float32, bfloat16 or float16; or, on the CPU, int8, with room for
            the scales: (pages, page size, H, `paging.page_width(D, int8)`), the page size a multiple of 64.
        rows: (B, T, H, D), pages' dtype or, where that is int8, any of the other three.
        page_table: (B, P), int32: position j of sequence b is row j % page size of page page_table[b, j // page size].
        positions: (B, T), int64 or int32; each row's own.

    Returns:
        pages.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, or a gradient that is asked for.
        IndexError: a position beyond the table, or an entry of it that names no page.
        NotImplementedError: int8 pages on a CUDA device.
    """
    if torch.is_grad_enabled() and (pages.requires_grad or rows.requires_grad):
        raise ValueError("[write_pages] has no gradients: pages and rows must not require one "
                         "(call within torch.no_grad())")  # fmt: skip
    _C.write_pages(pages, rows if rows.stride(-1) == 1 else rows.contiguous(), page_table, positions.contiguous())
    return pages
