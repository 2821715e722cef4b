from __future__ import annotations

import torch
from torch import Tensor


def next_positions(lengths: Tensor, count: int, capacity: int) -> tuple[Tensor, Tensor]:
    if (lengths + count > capacity).any():
        raise ValueError(f"the state holds {capacity} positions, but got {count} tokens after {int(lengths.max())}")
    return lengths[:, None] + torch.arange(count, device=lengths.device), lengths + count


def write_pages(pages: Tensor, rows: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    positions, size = positions.long(), pages.shape[1]
    if pages.dtype == torch.int8:
        rows = _int8(rows)
    pages[page_table.gather(1, positions // size), positions % size] = rows
    return pages


INT8_GROUP = 32


def _int8(rows: Tensor) -> Tensor:
    """(..., D) as bytes, and behind them those of the bfloat16 scales of the groups."""
    dim = rows.shape[-1]
    x = torch.nn.functional.pad(rows.float(), (0, -dim % INT8_GROUP)).unflatten(-1, (-1, INT8_GROUP))
    bits = (x.abs().amax(-1, keepdim=True) / 127).view(torch.int32) + 0xFFFF >> 16  # of the next bfloat16
    scale = (bits << 16).view(torch.float32)
    finite = x.isfinite().all(-1, keepdim=True)
    numbers = torch.where(finite & (scale > 0), x / scale, 0.0).round().to(torch.int8).flatten(-2)[..., :dim]
    scales = torch.where(finite, bits, 0x7FC0).to(torch.int16).flatten(-2)
    return torch.cat([numbers, scales.view(torch.int8)], -1)


def numbers(pages: Tensor) -> Tensor:
    """What int8 pages stand for, in float32."""
    width = pages.shape[-1]
    dim = width - 2 * -(-width // (INT8_GROUP + 2))
    scales = pages[..., dim:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    return pages[..., :dim].float() * scales.repeat_interleave(INT8_GROUP, -1)[..., :dim]
