from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

LEAST = 32 << 20  # bytes from which on the allocator gives memory back to the system at once
_spare: list[mmap.mmap] = []  # at most one


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, for what is large and comes again at each step: in the memory of the last such
    tensor, where that is gone. The system clears what it hands out anew, which takes longer than to write
    a gradient.

    One block is kept, and the system is told that it may have its pages back where memory is short."""
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    if size < LEAST:
        return torch.empty(shape, dtype=dtype)
    try:
        pages = _spare.pop()
    except IndexError:
        pages = None
    if pages is None or not size <= len(pages) <= 2 * size:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    loan = memoryview(pages)  # lives as long as the tensor's storage
    weakref.finalize(loan, _keep, pages).atexit = False
    return torch.frombuffer(loan, dtype=dtype, count=count).view(shape)


def _keep(pages: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_FREE"):
        pages.madvise(mmap.MADV_FREE)
    _spare[:] = [pages]
