from __future__ import annotations

import torch
from torch import Tensor


def next_positions(lengths: Tensor, count: int, capacity: int) -> tuple[Tensor, Tensor]:
    if (lengths + count > capacity).any():
        raise ValueError(f"the state holds {capacity} positions, but got {count} tokens after {int(lengths.max())}")
    return lengths[:, None] + torch.arange(count, device=lengths.device), lengths + count


def write_pages(pages: Tensor, rows: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    positions, size = positions.long(), pages.shape[1]
    pages[page_table.gather(1, positions // size), positions % size] = rows
    return pages
