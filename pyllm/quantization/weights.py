"""A weight as whole numbers of 8 or 4 bits, in groups along its input that share a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllm.ops import QuantizedWeight
from pyllm.ops.quantized_linear import PIECE
from pyllm.quantization.groups import choose_groups
from pyllm.quantization.units import choose_multiples, choose_units

_ROWS = 1 << 17  # elements searched at once: so many stay in the caches


def quantize_weight(weight: Tensor, bits: int, *, minimums: bool = False, importance: Tensor | None = None,
                    group: int = 32) -> QuantizedWeight:  # fmt: skip
    """The nearest quantised weight, group by group.

    Args:
        weight: (N, K), floating-point.
        bits: 8 or 4.
        minimums: groups have a smallest element of their own besides a scale: more exact, and half a bit more.
        importance: (K,), how much the error of each input counts, such as its mean square.
        group: elements that share a scale or, of 4 bits, whose pieces of 32 have scales that are multiples of one unit:
            32 or, but not of 8 bits with minimums, 64, 128 or 256.

    Raises:
        ValueError: a weight that is not finite, or beyond what a float16 scale can hold.
    """
    n, k = weight.shape
    filled = torch.cat((weight.detach(), weight.detach()[:, -1:].expand(n, -k % group)), 1)
    grouped = filled.unflatten(1, (-1, group))
    if importance is not None:
        importance = torch.nn.functional.pad(importance.float(), (0, -k % group)).unflatten(0, (-1, group))
        importance = importance + importance.mean() * 1e-3 + 1e-30  # an input that never came still counts a little
    wholes, scales, lows = [], [], []
    for rows in grouped.split(max(1, _ROWS // max(1, k))):
        rows = rows.float()
        if not rows.isfinite().all() or (rows.numel() and rows.abs().max() > 65504):
            raise ValueError("[quantize] weight must be finite, and at most 65504, to be quantised")
        if bits == 4 and group > PIECE:
            pieces = rows.unflatten(-1, (-1, PIECE))
            weigh = None if importance is None else importance.unflatten(-1, (-1, PIECE))
            groups = choose_multiples(pieces, choose_units(pieces, minimums, weigh), minimums, weigh)
            rows = pieces.flatten(1, 2)
        else:
            groups = choose_groups(rows, bits, minimums, importance)
        wholes.append(groups.round(rows).to(torch.uint8))
        scales.append(groups.scales.half())
        lows += [] if groups.minimums is None else [groups.minimums.half()]
    whole = torch.cat(wholes) if wholes else grouped.to(torch.uint8)
    return pack_wholes(whole, torch.cat(scales), torch.cat(lows) if minimums else None, bits, (n, k), group)


def pack_wholes(whole: Tensor, scales: Tensor, minimums: Tensor | None, bits: int, shape: tuple[int, int],
                group: int) -> QuantizedWeight:  # fmt: skip
    """A `QuantizedWeight` from its whole numbers, uint8 (N, G, n), and scales and minimums (N, G), of its groups or of
    their pieces."""
    pieces, size = -(-shape[1] // PIECE) if group > PIECE else whole.shape[1], min(group, PIECE)
    values = whole.flatten(1)[:, : pieces * size]
    if bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4

    def of_pieces(t: Tensor) -> Tensor:
        return t.repeat_interleave(whole.shape[2] // size, 1)[:, :pieces].contiguous()

    lows = None if minimums is None else of_pieces(minimums)
    return QuantizedWeight(values.contiguous(), of_pieces(scales), lows, bits, shape, group)
