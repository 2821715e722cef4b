"""GGML's packed weights as `ops.QuantizedWeight`s with the very same values, those of 5 and 6 bits in 8.

Q6_K has groups of 16. Scales and minimums of the K-quants, products of a float16 and a small whole number, are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyllm.ops import QuantizedWeight


class Layout(NamedTuple):
    """As of `ops.PackedQuantizedWeight`."""

    bits: int
    group: int
    half_scales: bool
    has_minimums: bool


class _Parts(NamedTuple):
    whole: Tensor  # (rows, G, group), uint8
    scales: Tensor  # (rows, G)
    minimums: Tensor | None = None


def _floats(raw: Tensor) -> Tensor:
    """Bytes (..., 2) as float16 (...)."""
    return raw.contiguous().view(torch.float16)[..., 0]


def _nibbles(raw: Tensor) -> Tensor:
    return torch.cat((raw & 15, raw >> 4), -1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """Bytes (..., 4) as 32 bits, each worth 16."""
    return (raw[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2) << 4


def _q8_0(raw: Tensor) -> _Parts:
    return _Parts(raw[..., 2:] ^ 128, _floats(raw[..., :2]))


def _q4_0(raw: Tensor) -> _Parts:
    return _Parts(_nibbles(raw[..., 2:]), _floats(raw[..., :2]))


def _q4_1(raw: Tensor) -> _Parts:
    return _Parts(_nibbles(raw[..., 4:]), _floats(raw[..., :2]), _floats(raw[..., 2:4]))


def _q5_0(raw: Tensor) -> _Parts:
    return _Parts(_nibbles(raw[..., 6:]) | _fifth_bits(raw[..., 2:6]), _floats(raw[..., :2]))


def _q5_1(raw: Tensor) -> _Parts:
    whole = _nibbles(raw[..., 8:]) | _fifth_bits(raw[..., 4:8])
    return _Parts(whole, _floats(raw[..., :2]), _floats(raw[..., 2:4]))


def _six_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minimums of a block, from its 12 bytes."""
    low, middle, high = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), -1)
    return scales, torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), -1)


def _scaled(raw: Tensor, whole: Tensor) -> _Parts:
    """Whole numbers (rows, blocks, 8, 32) with the scales that Q4_K and Q5_K begin with."""
    scale, minimum = _floats(raw[..., :2])[..., None].float(), _floats(raw[..., 2:4])[..., None].float()
    scales, minimums = _six_bits(raw[..., 4:16])
    return _Parts(whole.flatten(1, 2), (scale * scales).flatten(1), (minimum * minimums).neg().flatten(1))


def _q4_k(raw: Tensor) -> _Parts:
    quarters = raw[..., 16:].unflatten(-1, (4, 32))
    return _scaled(raw, torch.stack((quarters & 15, quarters >> 4), -2).flatten(-3, -2))


def _q5_k(raw: Tensor) -> _Parts:
    quarters = raw[..., 48:].unflatten(-1, (4, 32))
    low = torch.stack((quarters & 15, quarters >> 4), -2).flatten(-3, -2)
    high = raw[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return _scaled(raw, low | high << 4)


def _q6_k(raw: Tensor) -> _Parts:
    low, high = raw[..., :128].unflatten(-1, (2, 2, 32)), raw[..., 128:192].unflatten(-1, (2, 1, 32))
    low = torch.cat((low & 15, low >> 4), -2)
    high = high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    whole = (low | high << 4).flatten(-3).unflatten(-1, (16, 16))
    scales = raw[..., 192:208].contiguous().view(torch.int8) * _floats(raw[..., 208:])[..., None].float()
    return _Parts(whole.flatten(1, 2), scales.flatten(1))


# How a kind is held, the whole number that stands for 0 (without minimums), and what reads it.
KINDS: dict[str, tuple[Layout, int, Callable[[Tensor], _Parts]]] = {
    "Q4_0": (Layout(4, 32, True, False), 8, _q4_0),
    "Q4_1": (Layout(4, 32, True, True), 0, _q4_1),
    "Q5_0": (Layout(8, 32, True, False), 16, _q5_0),
    "Q5_1": (Layout(8, 32, True, True), 0, _q5_1),
    "Q8_0": (Layout(8, 32, True, False), 128, _q8_0),
    "Q4_K": (Layout(4, 32, False, True), 0, _q4_k),
    "Q5_K": (Layout(8, 32, False, True), 0, _q5_k),
    "Q6_K": (Layout(8, 16, False, False), 32, _q6_k),
}


def unpacked(kind: str, raw: Tensor, wanted: Layout, change: Callable[[Tensor], object] | None) -> QuantizedWeight:
    """The rows of a weight from their blocks, uint8 (rows, blocks, bytes), in a layout that holds their own.

    `change` puts rows in another order, in place.

    Raises:
        ValueError: scales or minimums that are not finite.
    """
    own, zero, read = KINDS[kind]
    whole, scales, minimums = read(raw)
    if not wanted.half_scales:
        scales, minimums = scales.float(), None if minimums is None else minimums.float()
    if not wanted.has_minimums:
        whole = whole + (2 ** (wanted.bits - 1) - zero)
    elif minimums is None:
        minimums = scales * -zero
    if wanted.group < own.group:
        whole = whole.flatten(1).unflatten(1, (-1, wanted.group))
        scales = scales.repeat_interleave(own.group // wanted.group, 1)
        minimums = None if minimums is None else minimums.repeat_interleave(own.group // wanted.group, 1)
    values = whole.flatten(1).contiguous()
    parts = [values, scales.contiguous(), *([] if minimums is None else [minimums.contiguous()])]
    if not all(bool(t.isfinite().all()) for t in parts[1:]):
        raise ValueError(f"{kind} must have scales that are finite")
    if change is not None:
        for part in parts:
            change(part)
    if wanted.bits == 4:
        parts[0] = values[:, ::2] | values[:, 1::2] << 4
    shape = (len(raw), values.shape[1])
    minimums = parts[2] if wanted.has_minimums else None
    return QuantizedWeight(parts[0], parts[1], minimums, wanted.bits, shape, wanted.group)
