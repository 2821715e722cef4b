"""GGML's packed weights as `ops.QuantizedWeight`s with the very same values, those of 5 and 6 bits in 8.

Q6_K has groups of 16. Scales and minimums of the K-quants, products of a float16 and a small whole number, are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops import QuantizedWeight


class Layout(NamedTuple):
    """As of `ops.PackedQuantizedWeight`."""

    bits: int
    group: int
    half_scales: bool
    has_minimums: bool


KINDS = {  # the least layout that holds each
    "Q4_0": Layout(4, 32, True, False),
    "Q4_1": Layout(4, 32, True, True),
    "Q5_0": Layout(8, 32, True, False),
    "Q5_1": Layout(8, 32, True, True),
    "Q8_0": Layout(8, 32, True, False),
    "Q4_K": Layout(4, 32, False, True),
    "Q5_K": Layout(8, 32, False, True),
    "Q6_K": Layout(8, 16, False, False),
}


def unpacked(kind: str, raw: Tensor, wanted: Layout, change: Callable[[Tensor], object] | None) -> QuantizedWeight:
    """The rows of a weight from their blocks, uint8 (rows, blocks, bytes), in a layout that holds their own.

    `change` puts rows in another order, in place.

    Raises:
        ValueError: scales or minimums that are not finite.
    """
    rows, k = len(raw), raw.shape[1] * (256 if kind.endswith("_K") else 32)
    dtype = torch.float16 if wanted.half_scales else torch.float32
    values = torch.empty(rows, k * wanted.bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, k // wanted.group, dtype=dtype)
    minimums = torch.empty_like(scales) if wanted.has_minimums else None
    if not _C.unpack_blocks(kind, raw, values, scales, minimums, wanted.bits, wanted.group):
        raise ValueError(f"{kind} must have scales that are finite")
    if change is not None:
        for part in (values, scales, minimums):
            if part is not None:
                change(part)
    return QuantizedWeight(values, scales, minimums, wanted.bits, (rows, k), wanted.group)
