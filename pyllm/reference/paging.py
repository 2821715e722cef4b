from __future__ import annotations

import torch
from torch import Tensor


def next_positions(lengths: Tensor, count: int, capacity: int) -> tuple[Tensor, Tensor]:
    if (lengths + count > capacity).any():
        raise ValueError(f"the state holds {capacity} positions, but got {count} tokens after {int(lengths.max())}")
    return lengths[:, None] + torch.arange(count, device=lengths.device), lengths + count


def write_pages(pages: Tensor, rows: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    positions, size = positions.long(), pages.shape[1]
    page, at = page_table.gather(1, positions // size), positions % size
    if pages.dtype == torch.int8:
        for part, own in zip(_parts(pages), _int8(rows), strict=True):
            part[page, at // TILE, :, :, at % TILE] = own
    else:
        pages[page, at] = rows
    return pages


INT8_GROUP, TILE = 32, 64


def _parts(pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of int8 pages by tiles of positions, (pages, tiles, H, ..., 64, ...): numbers by fours, the rest of them,
    and the bytes of the scales."""
    dim, groups = _dim(pages)
    tiles = pages.view(len(pages), -1, pages.shape[2], TILE * pages.shape[3])
    fours, rest, scales = tiles.split([dim // 4 * 4 * TILE, dim % 4 * TILE, 2 * groups * TILE], -1)
    return (fours.unflatten(-1, (dim // 4, TILE, 4)), rest.unflatten(-1, (1, TILE, dim % 4)),
            scales.unflatten(-1, (groups, TILE, 2)))  # fmt: skip


def _dim(pages: Tensor) -> tuple[int, int]:
    """How many numbers a head of int8 pages has, and how many groups of them."""
    groups = -(-pages.shape[-1] // (INT8_GROUP + 2))
    return pages.shape[-1] - 2 * groups, groups


def _int8(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., D) as bytes: the numbers by fours, those that are left over, and the bfloat16 scales of the groups."""
    dim = rows.shape[-1]
    x = torch.nn.functional.pad(rows.float(), (0, -dim % INT8_GROUP)).unflatten(-1, (-1, INT8_GROUP))
    bits = (x.abs().amax(-1, keepdim=True) / 127).view(torch.int32) + 0xFFFF >> 16  # of the next bfloat16
    scale = (bits << 16).view(torch.float32)
    finite = x.isfinite().all(-1, keepdim=True)
    numbers = torch.where(finite & (scale > 0), x / scale, 0.0).round().to(torch.int8).flatten(-2)[..., :dim]
    fours, rest = numbers.split([dim // 4 * 4, dim % 4], -1)
    scales = torch.where(finite, bits, 0x7FC0).to(torch.int16)
    return fours.unflatten(-1, (dim // 4, 4)), rest[..., None, :], scales.view(torch.int8)


def numbers(pages: Tensor) -> Tensor:
    """What int8 pages stand for, (pages, page size, H, D) in float32."""
    fours, rest, scales = (t.movedim(4, 2).flatten(1, 2) for t in _parts(pages))  # (pages, page size, H, ...)
    scales = scales.contiguous().view(torch.bfloat16).float().squeeze(-1)
    found = torch.cat([fours.flatten(-2), rest.flatten(-2)], -1).float()
    return found * scales.repeat_interleave(INT8_GROUP, -1)[..., : _dim(pages)[0]]
